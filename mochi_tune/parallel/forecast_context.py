"""What it costs that several GPUs share the tokens of a video, and the cheapest split of them: heads x ring.

Ranks that share the heads exchange tokens for heads, and wait for it; in a ring keys and values travel while attention
computes, but each block of keys is joined to those before, and each row computes all text. Which is cheaper depends on
the link between the GPUs. The terms are counted from `parallel.context` and `parallel.ring`; no link was measured.
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

# The share of a link's sheet that a large transfer reaches, and the seconds until any begins.
LINK_SHARE, START_SECONDS = 0.8, 25e-6
# Bytes of a number of q, k or v. Of the output that a block of keys is joined to: 2 are read and 4 written of the new
# one, 8 read and 4 written to join. Of an exchange for heads: read and written to pack, and again to unpack.
NUMBER_BYTES, JOINED_BYTES, PLACED_BYTES = 2, 18, 8
# Of a prompt, about: every row computes them all.
TEXT_TOKENS = 128
# q, k, v and the output for each rank, and the output of the text.
NUM_EXCHANGES = 5


@dataclass(frozen=True)
class Pass:
    """What a pass takes of each kind of work, relative to a forward pass."""

    attention: float = 1.0
    exchanged: float = 1.0
    travelled: float = 1.0
    joined: float = 1.0


FORWARD = Pass()
# Gradients go back the way that q, k, v and the output came, and q, k, v are exchanged again where they are recomputed.
# In the ring keys and values come once more, and their gradients in fp32.
BACKWARD = Pass(ATTENTION_BACKWARD * ATTENTION_SHARE / BACKWARD_SHARE, 1.75, 3.0, 2.0)
SAMPLING, TRAINING = (FORWARD,), (FORWARD, BACKWARD)


def possible_splits(num_ranks: int, num_heads: int) -> list[tuple[int, int]]:
    """Returns every (heads, ring) of so many ranks: those that share the heads have equally many each."""
    return [(n, num_ranks // n) for n in range(1, num_ranks + 1) if num_ranks % n == 0 and num_heads % n == 0]


def choose_split(
    num_ranks: int, config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> tuple[int, int]:
    """Returns the split (heads, ring) of ranks with the fewest foretold seconds; of equal ones, that of more heads.

    Args:
        num_ranks: that share the tokens of a video; any number.
        config: of the DiT.
        num_tokens: visual tokens of the video.
        card: of each rank.
        passes: that the work is made of, SAMPLING or TRAINING.
    """
    splits = possible_splits(num_ranks, config.num_heads)
    return min(reversed(splits), key=lambda split: split_seconds(split, config, num_tokens, card, passes))


def split_seconds(
    split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> float:
    """Returns the seconds of what depends on the split, in all blocks: attention, what is exchanged, what is joined.

    Args:
        split: ranks that share the heads, and rows of them in the ring.
        config: of the DiT.
        num_tokens: visual tokens of the video.
        card: of each rank.
        passes: that the work is made of.
    """
    heads, ring = split
    width, text = config.hidden_size_x, TEXT_TOKENS
    row = num_tokens / ring
    # Numbers of this rank's tokens, and of its row's with its heads.
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
        # Nothing comes while the last block of keys is attended.
        attending = computed / ring + max(computed * (ring - 1) / ring, each.travelled * travelled)
        seconds += attending + each.exchanged * (exchanged + placed) + each.joined * joined
    return config.depth * seconds


def sharing_seconds(
    split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card, passes: Sequence[Pass] = SAMPLING
) -> float:
    """Returns the seconds that `split_seconds` has beyond attention that is divided by the ranks and nothing else."""
    alone = split_seconds((1, 1), config, num_tokens, card, passes)
    return split_seconds(split, config, num_tokens, card, passes) - alone / (split[0] * split[1])


def pass_seconds(split: tuple[int, int], config: DiTConfig, num_tokens: int, card: Card) -> float:
    """Returns the seconds of a forward pass: the arithmetic, and what ranks that share the tokens exchange."""
    matrix, _ = dit_flops(config, -(-num_tokens // (split[0] * split[1])), 0)
    return matrix / (card.matrix * MATRIX_SHARE) + split_seconds(split, config, num_tokens, card)


def card_here() -> Card:
    """Returns the card of this process; an H100 where it is not known, or where there is none.

    Asked for its name, a GPU gives none of its memory to this process.
    """
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    return known_card(name) or CARDS["h100"]


def find_card(name: str, gib: int) -> tuple[str, float, Card | None]:
    """Returns a card's name in words, its memory in GiB and its speeds, if they are known.

    Raises:
        ConfigError: there is no GPU and no card is named, or one that is not known without its memory.
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
    return f"{name or 'a GPU'} (not here: foretold)", float(gib or (known.gib if known else 0)), known
