"""Estimates the cost of sharing the tokens of a video over several GPUs, and chooses the fastest split: heads x ring.

Ranks that share the heads exchange tokens for heads, and wait for the exchange. In a ring, keys and values are passed
on while attention computes, but the output of each block of keys is merged with the output so far, and each row
computes all text. Which is faster depends on the link between the GPUs. The terms are counted from `parallel.context`
and `parallel.ring`; no link was measured.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mochi_tune.errors import ConfigError
from mochi_tune.models.dit import DiTConfig
from mochi_tune.models.flops import dit_flops
from mochi_tune.parallel.forecast import (
    ATTENTION_BACKWARD,
    ATTENTION_SHARE,
    BACKWARD_SHARE,
    CARDS,
    GIB,
    MATRIX_SHARE,
    Card,
    known_card,
)

# Fraction of a link's nominal rate that a large transfer reaches, and seconds until a transfer begins.
LINK_SHARE, START_SECONDS = 0.8, 25e-6
# Bytes of one number of q, k or v. Memory traffic per number of the output to merge a block of keys: 2 bytes read and 4
# written of the new output, 8 read and 4 written to merge. Memory traffic per number of an exchange for heads: read and
# written to pack, and again to unpack.
NUMBER_BYTES, JOINED_BYTES, PLACED_BYTES = 2, 18, 8
# Typical text tokens of a prompt; every row computes all of them.
TEXT_TOKENS = 128
# Exchanges of a block: q, k, v and the output of the visual tokens, and the output of the text.
NUM_EXCHANGES = 5


@dataclass(frozen=True)
class Pass:
    """The amount of each kind of work in a pass, relative to a forward pass."""

    attention: float = 1.0
    exchanged: float = 1.0
    travelled: float = 1.0
    joined: float = 1.0


FORWARD = Pass()
# The gradients of q, k, v and the output are exchanged, and q, k, v once more when they are recomputed. In the ring,
# keys and values are passed on once more, and their gradients in fp32.
BACKWARD = Pass(ATTENTION_BACKWARD * ATTENTION_SHARE / BACKWARD_SHARE, 1.75, 3.0, 2.0)
SAMPLING, TRAINING = (FORWARD,), (FORWARD, BACKWARD)


def possible_splits(num_ranks: int, num_heads: int) -> list[tuple[int, int]]:
    """Returns every possible split (heads, ring) of the ranks: `heads` must divide the number of attention heads."""
    return [(n, num_ranks // n) for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_heads % n == 0]


def choose_split(
    num_ranks: int, config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> tuple[int, int]:
    """Returns the split (heads, ring) with the lowest estimated time; of equal ones, the one with more heads.

    Args:
        num_ranks: number of ranks that share the tokens of a video; any number.
        config: sizes of the DiT.
        num_tokens: visual tokens of the video.
        card: GPU of each rank.
        passes: the passes of a step, SAMPLING or TRAINING.
    """
    splits = possible_splits(num_ranks, config.num_heads)
    return min(reversed(splits), key=lambda split: split_seconds(split, config, num_tokens, card, passes))


def split_seconds(
    split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> float:
    """Returns the seconds of the work that depends on the split, in all blocks: attention, exchanging, merging.

    Args:
        split: number of ranks that share the heads, and of rows in the ring.
        config: sizes of the DiT.
        num_tokens: visual tokens of the video.
        card: GPU of each rank.
        passes: the passes of a step, SAMPLING or TRAINING.
    """
    heads, ring = split
    width, text = config.hidden_size_x, TEXT_TOKENS
    row = num_tokens / ring
    # Numbers of this rank's tokens with all heads, and of its row's tokens and the text with its heads.
    own, queries = row / heads * width, (row + text) * width / heads
    attention = 4 * queries * (num_tokens + text) / (card.matrix * ATTENTION_SHARE)
    exchanged = placed = travelled = joined = 0.0
    if heads > 1:
        sent = 4 * NUMBER_BYTES * own * (heads - 1) / heads
        exchanged = sent / (card.link * LINK_SHARE) + NUM_EXCHANGES * START_SECONDS
        placed = 4 * PLACED_BYTES * own / card.bandwidth
    if ring > 1:
        received = 2 * NUMBER_BYTES * num_tokens * width / heads * (ring - 1) / ring
        travelled = received / (card.link * LINK_SHARE) + (ring - 1) * START_SECONDS
        joined = (ring - 1) * JOINED_BYTES * queries / card.bandwidth
    seconds = 0.0
    for each in passes:
        computed = each.attention * attention
        # No transfer runs during the attention to the last block of keys.
        attending = computed / ring + max(computed * (ring - 1) / ring, each.travelled * travelled)
        seconds += attending + each.exchanged * (exchanged + placed) + each.joined * joined
    return config.depth * seconds


def sharing_seconds(
    split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> float:
    """Returns the overhead of a split in seconds: `split_seconds` minus attention divided evenly by the ranks."""
    alone = split_seconds((1, 1), config, num_tokens, card, passes)
    return split_seconds(split, config, num_tokens, card, passes) - alone / (split[0] * split[1])


def pass_seconds(split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card) -> float:
    """Returns the seconds of a forward pass: matrix products, and what depends on the split."""
    matrix, _ = dit_flops(config, -(-num_tokens // (split[0] * split[1])), 0)
    return matrix / (card.matrix * MATRIX_SHARE) + split_seconds(split, config, num_tokens, card)


def card_here() -> Card:
    """Returns the GPU of this process; an H100 if it is unknown, or if there is none.

    Reading the name of a GPU allocates none of its memory.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return known_card(name) or CARDS["h100"]


def find_card(name: str, gib: int) -> tuple[str, float, Card | None]:
    """Returns the display name of a GPU, its memory in GiB and, if known, its speeds.

    Args:
        name: a key of CARDS, or another name if `gib` is given; empty for the GPU of this process.
        gib: memory in GiB; 0 for that of the known GPU.

    Raises:
        ConfigError: no GPU is named and there is none, or an unknown one is named without its memory.
    """
    if not name and not gib:
        if not torch.cuda.is_available():
            raise ConfigError(f"there is no GPU here: name one, as card=4090; known are {', '.join(CARDS)}.")
        properties = torch.cuda.get_device_properties(0)
        return properties.name, torch.cuda.mem_get_info(0)[0] / GIB, known_card(properties.name)
    known = CARDS.get(name.lower())
    if known is None and not gib:
        raise ConfigError(
            f"card={name} is not known: use one of {', '.join(CARDS)}, or give its memory too, as card_gib=24."
        )
    return f"{name or 'a GPU'} (not here: estimated)", float(gib or (known.gib if known else 0)), known
