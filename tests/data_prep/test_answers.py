import pytest
from helpers_chat import CAPTION
from helpers_prepare import TINY

from mochi_tune.data_prep.answers import MAX_WORDS_UNCOUNTED, CaptionLength, clean_answer, find_fault
from mochi_tune.models.text_encoder import MAX_TOKENS, load_tokenizer, measure_caption


@pytest.mark.parametrize(
    "answer",
    [
        f"Here is the caption:\n\n{CAPTION}",
        f"Sure! Here's a detailed caption for the video:\n{CAPTION}",
        f"**Caption:** {CAPTION}",
        f"**Caption**\n\n{CAPTION}",
        f"# A red ball\n\n{CAPTION}",
        f"Caption: {CAPTION}",
        f'"{CAPTION}"',
        f"“{CAPTION}”",
        f"```text\n{CAPTION}\n```",
        f"<think>The user wants a caption. Here is one: a ball.</think>\n\n{CAPTION}",
        f"It is a ball, I think.\n</think>\n{CAPTION}",
        f"{CAPTION}\n\nLet me know if you would like another one!",
        CAPTION.replace("red ball", "**red ball**").replace("still", "__still__"),
        CAPTION.replace(", while", ",\nwhile"),
        f"\n\t {CAPTION}  \n",
    ],
)
def test_what_is_around_a_caption_is_taken_away(answer):
    assert clean_answer(answer) == CAPTION and not find_fault(CAPTION, "en")


@pytest.mark.parametrize(
    "caption",
    [
        'A sign reads "open" and a man turns it so that it reads "closed" in the window of a shop.',
        '"Open" is what the sign in the window of the shop says, and a man walks by "slowly".',
        "Here is where a river meets the sea in the evening, and the water of it is brown.",
        "A chart with 1. a red bar and 2. a blue bar is on the wall of a room.",
        "Caption cards fall on to the floor of a dark theatre, in slow motion.",
        "A man in a red coat walks down the Rue de la Paix in Paris, holding a basket of fruit, smiling at a child.",
        "Woman in a red dress, holding fruit, dances alone in front of mirrors, warm light, slow motion, close view.",
        "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 painted on a wall beside the road.",
        "José and Zoë dance the tango in a café at night, and the camera circles them.",
    ],
)
def test_a_caption_is_not_changed(caption):
    assert clean_answer(caption) == caption and not find_fault(caption, "en")


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "is empty"),
        (" \n\t ", "is empty"),
        ("<think>the ball", "has only thoughts"),
        ("I'm sorry, but I can't help with that.", "is a refusal"),
        ("I’m sorry, I can’t describe people.", "is a refusal"),
        ("As an AI language model, I do not see pictures.", "is a refusal"),
        ("The pictures show something that I cannot describe to you.", "is a refusal"),
        ("- a ball\n- a table\n- a window", "is a list"),
        ("1. A ball rolls.\n2. It stops.", "is a list"),
        ('{"caption": "a ball rolls over the table"}', "is code or JSON"),
        ("<!DOCTYPE html><html><body>Log in to the network</body></html>", "is a web page"),
        ("x" * 9000, "has 9000 characters"),
        ("the ball rolls " * 50, "repeats itself"),
        ("a ball\0 rolls over the table", "contains characters that are not text"),
        ("a ball \ud83d rolls over the table", "contains characters that are not text"),
        ("Ball.", "has only 1 words"),
        ("一个红色的小球在灰色的桌子上从左向右缓慢滚动，镜头保持静止。", "is not English: 0 of its"),
        ("Маленький красный мяч медленно катится по серому столу.", "is not English: 0 of its"),
        (
            "Une petite balle rouge roule lentement de gauche à droite sur une table grise, tandis que la caméra reste "
            "immobile et qu'une douce lumière blanche tombe d'une fenêtre.",
            "is not English: 0 of its",
        ),
        (
            "Ein kleiner roter Ball rollt langsam von links nach rechts über einen grauen Tisch, während die Kamera in "
            "der Höhe des Tisches stillsteht.",
            "is not English: 1 of its",
        ),
        (
            "Een kleine rode bal rolt langzaam over een grijze tafel in een kamer, terwijl de camera op de hoogte van "
            "de tafel is en het licht zacht is.",
            "is not English: 4 of its",
        ),
        (
            "Uma pequena bola vermelha rola lentamente da esquerda para a direita sobre uma mesa cinza, enquanto a "
            "câmera permanece parada.",
            "is not English: 2 of its",
        ),
        (
            "Una pequeña pelota roja rueda lentamente de izquierda a derecha sobre una mesa gris, mientras la cámara "
            "permanece quieta.",
            "is not English: 1 of its",
        ),
        ("!!! ... ??? !!!", "is not English: 0 of its 0 letters"),
    ],
)
def test_what_is_no_caption_is_told(answer, fault):
    assert find_fault(clean_answer(answer), "en").startswith(fault)


def test_another_language_is_taken_where_it_is_asked_for():
    assert not find_fault("Маленький красный мяч медленно катится по столу.", "any")


def test_two_megabytes_are_refused_at_once():
    for piece in ("**a ", "__", "<think>", "Here is ", '"', "\n- x", "\n\n"):
        assert find_fault(clean_answer(piece * (2**21 // len(piece))), "any")


def test_a_caption_is_cut_at_a_sentence_that_fits():
    length = CaptionLength(load_tokenizer(TINY / "tokenizer"))
    sentence = "A ball rolls over the table. "
    text = (sentence * 100).strip()
    assert length.fits(sentence) and not length.fits(text) and f"the maximum is {MAX_TOKENS}" in length.describe(text)
    cut = length.cut(text)
    assert length.fits(cut) and cut.endswith("table.") and not length.fits(f"{cut} {sentence.strip()}")
    words = "ball " * 400
    cut = length.cut(words.strip())
    assert length.fits(cut) and cut.endswith("ball") and not length.fits(f"{cut} ball")
    assert length.words_to_ask_for(text) < len(cut.split()) < len(text.split())
    assert (measure_caption(cut, load_tokenizer(TINY / "tokenizer")).num_tokens or 0) <= MAX_TOKENS


def test_without_a_tokenizer_words_are_counted():
    length = CaptionLength(None)
    assert length.fits("ball " * MAX_WORDS_UNCOUNTED) and not length.fits("ball " * (MAX_WORDS_UNCOUNTED + 1))
    assert "without T5's tokenizer" in length.describe("ball")
