"""Prompts of the command line: the WebUIs' syntax, and what A1111 computes of it."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from lib_dinotile import DinotileError
from lib_dinotile import __main__ as cli
from lib_dinotile.hosts.diffusers import load_host
from lib_dinotile.hosts.diffusers_prompts import PromptEncoder, literal, parse_prompt
from lib_dinotile.settings import Generation
from tests.test_diffusers import HALVES, NAMED, run, sd15, sdxl  # noqa: F401
from tests.test_regions import Shows
from tests.test_tiling import random_image

LONG = "a cat, " + "b " * 100


# What is written ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt, parts",
    [  # those of A1111's own docstring first
        ("normal text", [[("normal text", 1.0)]]),
        ("an (important) word", [[("an ", 1.0), ("important", 1.1), (" word", 1.0)]]),
        ("(unbalanced", [[("unbalanced", 1.1)]]),
        (r"\(literal\]", [[("(literal]", 1.0)]]),
        ("(unnecessary)(parens)", [[("unnecessaryparens", 1.1)]]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                [
                    ("a ", 1.0),
                    ("house", 1.573),
                    (" ", 1.1),
                    ("on", 1.0),
                    (" a ", 1.1),
                    ("hill", 0.55),
                    (", sun, ", 1.1),
                    ("sky", 1.4641),
                    (".", 1.1),
                ]
            ],
        ),
        ("[word]", [[("word", 1 / 1.1)]]),
        ("fur :3) and 1:2", [[("fur :3) and 1:2", 1.0)]]),
        ("(fur:1.3", [[("fur:1.3", 1.1)]]),
        (r"back\slash \\", [[("backslash \\", 1.0)]]),
        ("", [[]]),
        ("fur BREAK stone", [[("fur", 1.0)], [("stone", 1.0)]]),
        ("a BREAK BREAK b", [[("a", 1.0)], [], [("b", 1.0)]]),
        ("BREAKFAST, SAND", [[("BREAKFAST, SAND", 1.0)]]),
        ("a | b: c", [[("a | b: c", 1.0)]]),
    ],
)
def test_a_prompt_is_read_as_in_the_webuis(prompt, parts):
    found = parse_prompt(prompt)
    assert [[text for text, _ in part] for part in found] == [[text for text, _ in part] for part in parts]
    assert np.allclose([w for part in found for _, w in part], [w for part in parts for _, w in part])


def test_a_break_within_brackets_begins_a_chunk_which_a1111_deliberately_unlike_us_ignores(small):
    assert parse_prompt("(fur BREAK stone:0.5)") == [[("fur", 0.5)], [("stone", 0.5)]]
    found = PromptEncoder(small)("(a b BREAK c:0.5) d")[0]
    assert torch.allclose(found, by_hand(small, plain("ab", 0.5), [("c", 0.5), ("d", 1.0)]), atol=1e-5)


@pytest.mark.parametrize(
    "prompt, says",
    [
        ("a <lora:fur:0.8> cat", "'<lora:fur:0.8>' is not read on the command line: give --lora FILE:WEIGHT instead"),
        ("a <lyco:fur> cat", "give --lora FILE:WEIGHT"),
        ("a <hypernet:fur:1> cat", "'<hypernet:fur:1>' is not supported"),
        ("fur AND stone", "AND is not supported on the command line: write one prompt, or name places"),
        ("fur AND stone :0.5", "AND is not supported"),
        ("a [red:blue:0.5] cat", r"\[red:blue:0.5\] changes words with the steps"),
        ("a [blue:10] cat", "changes words with the steps"),
        ("a [blue::10] cat", "changes words with the steps"),
        ("a [red|blue] cat", "changes words with the steps"),
        ("a [red:blue:-1] cat", "changes words with the steps"),
        ("a [red:+1e1] cat", "changes words with the steps"),
        ("a ([red|(blue)]) cat", "changes words with the steps"),
    ],
)
@pytest.mark.parametrize("name", ["prompt", "negative"])
def test_syntax_that_the_command_line_has_not_is_refused_in_one_line(sd15, name, prompt, says):  # noqa: F811
    with pytest.raises(DinotileError, match=f"^{name}: .*{says}") as error:
        load_host(Generation(model=sd15, **{name: prompt}))
    assert error.value.status_code == 422


@pytest.mark.parametrize("settings", [{"tile_prompt": "a AND b"}, {"tile_prompts": "2: a AND b"}, NAMED])
def test_so_it_is_in_words_of_tiles_and_regions_before_any_is_sampled(sd15, settings, monkeypatch):  # noqa: F811
    monkeypatch.setattr("lib_dinotile.hosts.diffusers.DiffusersHost.sample", None)
    settings = {name: value.replace("fur", "fur AND stone") for name, value in settings.items()}
    with pytest.raises(DinotileError, match="prompt: AND is not supported"):
        run(sd15, conditioner=Shows(HALVES), settings=settings)


def test_on_the_command_line_it_is_one_line_and_exit_code_2(sd15, tmp_path, capsys):  # noqa: F811
    random_image(20, 20).save(tmp_path / "in.png")
    arguments = [str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--model", sd15, "--quiet"]
    assert cli.main(["upscale", *arguments, "--prompt", "a <lora:fur:1>"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("dinotile: prompt: ") and "--lora" in said[-1]


@pytest.mark.parametrize("option", ["prompt", "negative", "tile-prompt", "tile-prompts", "region-prompts"])
@pytest.mark.parametrize("text", ["x AND y", "[x|y]", "<lora:fur:1>"])
def test_it_is_called_by_the_option_that_it_is_in_before_a_model_is_loaded(option, text, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lib_dinotile.hosts.diffusers.load_host", None)
    random_image(20, 20).save(tmp_path / "in.png")
    words = {"tile-prompts": "2: ", "region-prompts": "A: "}.get(option, "") + text
    files = [str(tmp_path / "in.png"), str(tmp_path / "out.png")]
    assert cli.main(["upscale", *files, "--model", "x.safetensors", f"--{option}", words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"dinotile: {option.replace('-', '_')}: ")
    assert ("--region-prompts" in line) == ("AND" in text and option != "region-prompts")


@given(st.text("ab ()[]\\|:1.<>lora,\nANDBREK", max_size=30))
def test_literal_text_is_no_syntax(text):
    lower = literal(text) if "AND" in text or "BREAK" in text else text
    assert "".join(words for part in parse_prompt(literal(text)) for words, _ in part).lower() == text.lower()
    assert all(weight == 1 for part in parse_prompt(literal(lower)) for _, weight in part)


# What is computed -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """As much of a pipeline as has a part: letters, a comma and brackets are tokens, chunks have 8."""
    folder, letters = tmp_path_factory.mktemp("small"), "abcdefghijklmnopqrstuvwxyz,()[]"
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=10)
    torch.manual_seed(0)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=16,
            num_attention_heads=2,
            num_hidden_layers=4,
            max_position_embeddings=10,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    ).eval()
    # As in trained ones the mean of what it gives is not zero, which that of weighted words is held against.
    torch.nn.init.normal_(getattr(text, "text_model", text).final_layer_norm.bias, mean=0.5)
    return SimpleNamespace(tokenizer=tokenizer, text_encoder=text, config={})


def by_hand(pipe, *chunks, skip=1):
    """The embeddings of chunks of single letters, each with its weight."""
    parts = []
    for chunk in chunks:
        ids = [pipe.tokenizer.convert_tokens_to_ids(f"{letter}</w>") for letter, _ in chunk]
        end = pipe.tokenizer.eos_token_id
        ids = [pipe.tokenizer.bos_token_id, *ids, *[end] * (9 - len(ids))]
        with torch.no_grad():
            output = pipe.text_encoder(torch.tensor([ids]), output_hidden_states=True)
        states = output.last_hidden_state
        if skip > 1:
            norm = getattr(pipe.text_encoder, "text_model", pipe.text_encoder).final_layer_norm
            states = norm(output.hidden_states[-skip]).detach()
        weights = torch.tensor([1.0, *(weight for _, weight in chunk), *[1.0] * (9 - len(chunk))])
        weighted = states * weights[None, :, None]
        parts.append(weighted * states.mean() / weighted.mean())
    return torch.cat(parts, 1)


def plain(letters, weight=1.0):
    return [(letter, weight) for letter in letters]


@pytest.mark.parametrize(
    "prompt, chunks",
    [
        ("a (b:1.5) [c]", [[("a", 1.0), ("b", 1.5), ("c", 1 / 1.1)]]),
        ("a b c d e f g h i j", [plain("abcdefgh"), plain("ij")]),
        ("a b BREAK c", [plain("ab"), plain("c")]),
        # What comes after a comma goes into the next chunk as a whole, if that is near.
        ("a b c d , e f g h i", [plain("abcd,"), plain("efghi")]),
        ("a b c d e f g h , i", [plain("abcdefgh"), plain(",i")]),
        ("", [[]]),
    ],
)
def test_embeddings_are_those_of_a1111(small, prompt, chunks):
    positive, negative = PromptEncoder(small)(prompt)
    assert torch.allclose(positive, by_hand(small, *chunks), atol=1e-5)
    assert torch.allclose(negative, by_hand(small, []), atol=1e-5)
    positive, negative = PromptEncoder(small, negative=prompt)("a")
    assert torch.allclose(negative, by_hand(small, *chunks), atol=1e-5)


def test_a_tokenizer_that_does_not_say_how_long_a_text_may_be_makes_no_difference(small):
    other = copy.deepcopy(small.tokenizer)
    other.model_max_length = int(1e30)  # as transformers has it then
    boundless = SimpleNamespace(tokenizer=other, text_encoder=small.text_encoder, config={})
    for prompt in ("", "a b c d e f g h i j"):
        assert torch.equal(PromptEncoder(boundless)(prompt)[0], PromptEncoder(small)(prompt)[0])


@pytest.mark.parametrize("skip", [1, 2, 3])
def test_clip_skip_counts_as_in_the_webuis(small, skip):
    found = PromptEncoder(small, clip_skip=skip)("a b")[0]
    assert torch.allclose(found, by_hand(small, plain("ab"), skip=skip), atol=1e-5)


def test_more_layers_than_there_are_is_refused(sd15):  # noqa: F811
    with pytest.raises(DinotileError, match="clip_skip: 3 is not allowed, this checkpoint's text encoder has 2 layers"):
        load_host(Generation(model=sd15, clip_skip=3))


@pytest.mark.parametrize("family, skip", [("sd15", 1), ("sdxl", 1), ("sdxl", 2)])
def test_a_short_plain_prompt_is_encoded_as_by_diffusers(family, skip, request):
    """Which begins at SDXL's last layer but one, too: 1 and 2 are the same."""
    kind = StableDiffusionXLPipeline if family == "sdxl" else StableDiffusionPipeline
    pipe = kind.from_pretrained(request.getfixturevalue(family))
    given = {"prompt": "a cat", "negative_prompt": "cloth", "num_images_per_prompt": 1, "device": "cpu"}
    with torch.no_grad():
        wanted = pipe.encode_prompt(**given, do_classifier_free_guidance=True)
    found = PromptEncoder(pipe, "cloth", skip)("a cat")
    assert len(found) == len(wanted[: len(found)]) == (4 if family == "sdxl" else 2)
    assert all(torch.equal(one, other) for one, other in zip(found, wanted))


def test_sdxl_s_empty_negative_prompt_is_zeros_as_in_the_webuis(sdxl):  # noqa: F811
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    _, negative, _, pooled = PromptEncoder(pipe)("a cat")
    assert not negative.any() and not pooled.any()
    _, negative, _, pooled = PromptEncoder(pipe, "cloth")("a cat")
    assert negative.any() and pooled.any()


def test_sdxl_is_told_a_long_prompt_by_both_encoders_and_by_the_pooled_embedding_of_its_first_chunk(sdxl):  # noqa: F811
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl)
    encode = PromptEncoder(pipe, "cloth")
    long, _, pooled, _ = encode("a cat BREAK fur")
    (first, _, first_pooled, _), (second, *_) = encode("a cat"), encode("fur")
    assert torch.allclose(long, torch.cat([first, second], 1), atol=1e-5)
    assert torch.allclose(pooled, first_pooled, atol=1e-5)
    weighted, _, own, _ = encode("a (cat:1.5)")
    assert torch.equal(own, first_pooled) and not torch.allclose(weighted[..., :1024], first[..., :1024])
    assert not torch.allclose(weighted[..., 1024:], first[..., 1024:])


# What is painted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, cfg, order", [("sd15", 1.0, "chess"), ("sd15", 5.0, "fused"), ("sdxl", 5.0, "chess")])
def test_prompts_of_any_length_give_the_same_image_in_any_batch(family, cfg, order, request):
    model = request.getfixturevalue(family)
    words = {"region_prompts": "A: fur\nB: " + LONG, "colour": "none", "order": order}
    more = {"conditioner": Shows(HALVES), "cfg": cfg, "negative": "a BREAK b BREAK c", "settings": words}
    told = run(model, **more)
    assert abs(run(model, 1, **more) - told).max() <= 1
    short = {**words, "region_prompts": "A: fur\nB: " + LONG[:150]}
    assert abs(run(model, **{**more, "settings": short}) - told).max() > 1  # the end of it is read, too


@pytest.mark.parametrize("prompt", ["a (cat:1.5)", "[a] cat", "a BREAK cat", LONG])
def test_weights_breaks_and_length_count(sd15, prompt):  # noqa: F811
    assert abs(run(sd15, prompt=prompt) - run(sd15, prompt="a cat")).max() > 0
