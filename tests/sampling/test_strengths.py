import pytest

from mochi_tune.config.load import load_config
from mochi_tune.errors import ConfigError
from mochi_tune.sampling.sampler import SamplerSettings
from mochi_tune.sampling.strengths import as_ranges, check_schedules, read_block_strengths, read_schedules


def sample_config(*settings):
    return load_config("my_lora", ["model=tiny", *(f"sample.{setting}" for setting in settings)]).sample


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("{0-2: 0.5, 47: 0}", [{0: 0.5, 1: 0.5, 2: 0.5, 47: 0.0}] * 2),
        ("{'3': 2, ' 4 - 5 ': -1}", [{3: 2.0, 4: -1.0, 5: -1.0}] * 2),
        ("[{0: 0.5}, {}]", [{0: 0.5}, {}]),
        ("{}", [{}, {}]),
    ],
)
def test_factors_are_given_by_block_or_range_for_all_adapters_or_each(given, expected):
    assert read_block_strengths(sample_config(f"block_strength={given}"), 2, 48) == expected


def test_factors_are_recorded_as_they_are_given():
    [factors] = read_block_strengths(sample_config("block_strength={4: 1, 0-2: 0.5, 3: 0.5, 9: 1}"), 1, 48)
    assert as_ranges(factors) == {"0-3": 0.5, "4": 1.0, "9": 1.0}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("{40-48: 0.5}", "'40-48' is not a block of the base: use a number from 0 to 47, or a range such as 0-47"),
        ("{5-3: 0.5}", "'5-3' is not a block of the base"),
        ("{attn: 0.5}", "'attn' is not a block of the base"),
        ("{-1: 0.5}", "'-1' is not a block of the base"),
        ("{99999999999: 0.5}", "is not a block of the base"),
        ("{0-9: 1, 9-11: 0.5}", "names block 9 twice: use ranges that do not overlap"),
        ("[{0: 0.5}]", "has 1 values for 2 adapters: give one for all or one each"),
        ("{0: x}", "does not fit: it takes numbers by block"),
        ("0.5", "does not fit: it takes numbers by block"),
        ("[0.5, 1]", "does not fit: it takes numbers by block"),
        ("{0: .inf}", "does not fit|must be finite"),
    ],
)
def test_factors_of_no_block_are_refused(given, said):
    with pytest.raises(ConfigError, match=said):
        read_block_strengths(sample_config(f"block_strength={given}"), 2, 48)


def test_a_schedule_is_for_all_adapters_or_one_for_each():
    assert read_schedules(sample_config(), 2) == [(), ()]
    assert read_schedules(sample_config("strength_schedule=1"), 1) == [(1.0,)]
    assert read_schedules(sample_config("strength_schedule=[1,0.5]"), 2) == [(1.0, 0.5)] * 2
    assert read_schedules(sample_config("strength_schedule=[[1,0.5],[0]]"), 2) == [(1.0, 0.5), (0.0,)]


@pytest.mark.parametrize(
    ("given", "num_adapters", "said"),
    [
        ("[]", 1, r"strength_schedule=\[\] has no value for a step"),
        ("[]", 0, r"strength_schedule=\[\] has no value for a step"),
        ("[[1],[]]", 2, r"\[\[1.0\], \[\]\] has no value for a step"),
        ("[[1]]", 2, "has 1 values for 2 adapters"),
        ("[1]", 0, r"strength_schedule=\[1.0\] has no adapter"),
        ("[1,[1]]", 2, "does not fit: it takes a list of numbers"),
    ],
)
def test_schedules_that_cannot_be_are_refused(given, num_adapters, said):
    with pytest.raises(ConfigError, match=said):
        read_schedules(sample_config(f"strength_schedule={given}"), num_adapters)


def test_a_schedule_is_no_longer_than_the_shortest_rendering():
    long, short = SamplerSettings(9, 1.0, 0.1), SamplerSettings(2, 1.0, 0.1)
    check_schedules([(), (1, 2, 3)], [long])
    with pytest.raises(ConfigError, match="has 3 numbers for 2 steps: give at most one for each step"):
        check_schedules([(), (1, 2, 3)], [long, short])
