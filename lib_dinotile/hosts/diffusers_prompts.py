"""Prompts in the WebUIs' syntax, encoded for the UNets of diffusers.

`(word)`, `(word:1.3)`, `[word]`, BREAK and any number of tokens, with the chunks and weights ("Original") of A1111,
so that a prompt from the WebUI gives the same embeddings here, but for a BREAK within brackets (see `parse_prompt`).
No library does that: compel 2.5 has its own syntax, weighs by interpolation and needs transformers 5; sd_embed is not
on PyPI; diffusers' pipelines for long prompts (`lpw_stable_diffusion`) are community files outside the package, and its
`clip_skip` fails with transformers 5.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lib_dinotile import DinotileError

BACKTRACK = 20
"""Where a chunk is full, words after a comma that is at most so many tokens back go into the next one (the default of
both WebUIs)."""

_NUMBER = r"(?:\d+\.?\d*|\.\d+)"
_TOKEN = re.compile(
    rf"""\\(?P<escaped>[()\[\]\\])
    |(?P<backslash>\\)
    |(?P<open>[(\[])
    |:\s*(?P<weight>[+-]?{_NUMBER})\s*\)
    |(?P<close>[)\]])
    |(?P<chunk>\s*\bBREAK\b\s*)
    |(?P<text>.)""",
    re.X | re.S,
)
_CLOSES = {")": "(", "]": "["}
_FACTORS = {"(": 1.1, "[": 1 / 1.1}
_SCHEDULED = re.compile(rf":\s*[+-]?{_NUMBER}(?:[eE][+-]?\d+)?\s*$")
_EXTRA_NETWORK = re.compile(r"(?<!\\)<(\w+):[^>]+>")

Weighted = tuple[str, float]
"""Text, and its weight."""


def parse_prompt(prompt: str, name: str = "prompt") -> list[list[Weighted]]:
    """The parts of a prompt between its BREAKs, each as texts with their weights.

    A BREAK within brackets begins a part, too. In A1111 it does not: its `parse_prompt_attention` marks a BREAK by the
    weight -1, and multiplies that by the brackets'. The difference is deliberate: whoever writes BREAK wants a break.

    name: what messages call it. DinotileError for what the command line has no equivalent of.
    """
    _refuse_networks(prompt, name)
    if re.search(r"\bAND\b", prompt):
        other = "" if name == "region_prompts" else ", or name places with --region-prompts"
        raise DinotileError(f"{name}: AND is not supported on the command line: write one prompt{other}")
    parts: list[list[Weighted]] = [[]]
    opened: list[tuple[str, int, tuple[int, int]]] = []
    """Brackets that are open: which, its place in the prompt, and in `parts`."""

    def close(bracket: str, factor: float) -> int:
        place = max(n for n, each in enumerate(opened) if each[0] == bracket)
        _, at, (part, first) = opened.pop(place)
        for number in range(part, len(parts)):
            start = first if number == part else 0
            parts[number][start:] = [(text, weight * factor) for text, weight in parts[number][start:]]
        return at

    def is_open(bracket: str) -> bool:
        return any(each[0] == bracket for each in opened)

    for token in _TOKEN.finditer(prompt):
        kind, text = token.lastgroup, token.group()
        if kind == "open":
            opened.append((text, token.start(), (len(parts) - 1, len(parts[-1]))))
        elif kind == "weight" and is_open("("):
            close("(", float(token["weight"]))
        elif kind == "close" and is_open(_CLOSES[text]):
            at = close(_CLOSES[text], _FACTORS[_CLOSES[text]])
            if text == "]":
                _refuse_editing(prompt[at + 1 : token.start()], name)
        elif kind == "chunk":
            parts.append([])
        elif kind != "backslash":
            parts[-1].append((token["escaped"] or text, 1.0))
    for bracket, *_ in opened[::-1]:
        close(bracket, _FACTORS[bracket])
    return [_merged(part) for part in parts]


def _merged(texts: Sequence[Weighted]) -> list[Weighted]:
    """With neighbours of one weight together: words are split into tokens as a whole."""
    merged: list[Weighted] = []
    for text, weight in texts:
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return merged


def _refuse_networks(prompt: str, name: str) -> None:
    found = _EXTRA_NETWORK.search(prompt)
    if found is None:
        return
    if found[1] in ("lora", "lyco"):
        raise DinotileError(f"{name}: {found[0]!r} is not read on the command line: give --lora FILE:WEIGHT instead")
    raise DinotileError(f"{name}: {found[0]!r} is not supported on the command line: leave it out")


def _refuse_editing(inner: str, name: str) -> None:
    """DinotileError if what stands in square brackets changes with the steps."""
    if re.search(r"(?<!\\)\|", inner) or _SCHEDULED.search(inner):
        raise DinotileError(
            f"{name}: [{inner[:40]}] changes words with the steps: not supported on the command line, choose one"
        )


def literal(text: str) -> str:
    """A prompt that says exactly `text`: nothing in it is syntax."""
    text = re.sub(r"\b(AND|BREAK)\b", lambda found: found[0].lower(), text)  # for CLIP the same words
    return re.sub(r"([\\()\[\]<])", r"\\\1", text)


class PromptEncoder:
    """The text encoders of a Stable Diffusion pipeline, for prompts of any length."""

    def __init__(self, pipe: Any, negative: str = "", clip_skip: int = 1) -> None:
        """pipe: of diffusers, with one text encoder, or SDXL's two; clip_skip as the WebUIs count: 1 is the last layer.

        DinotileError if a text encoder has not that many layers.
        """
        self._xl = getattr(pipe, "text_encoder_2", None) is not None
        self._encoders = [(pipe.tokenizer, pipe.text_encoder)]
        if self._xl:
            self._encoders.append((pipe.tokenizer_2, pipe.text_encoder_2))
            clip_skip = max(clip_skip, 2)  # trained on the layer before the last, which Forge counts from, too
        self._skip, self._negative = clip_skip, negative
        fewest = min(encoder.config.num_hidden_layers for _, encoder in self._encoders)
        if clip_skip > max(fewest, 1 + self._xl):
            raise DinotileError(
                f"clip_skip: {clip_skip} is not allowed, this checkpoint's text encoder has {fewest} layers"
            )
        # As the WebUIs do, where diffusers' own settings say so of an empty one.
        self._zeros = self._xl and not negative and bool(pipe.config.get("force_zeros_for_empty_prompt"))

    @torch.no_grad()
    def __call__(self, prompt: str) -> tuple[Tensor, ...]:
        """Embeddings (1, n, D) of a prompt and of the negative one, for SDXL also the pooled ones (1, D).

        DinotileError for syntax that is not supported.
        """
        positive, negative = self._encode(prompt, "prompt"), self._encode(self._negative, "negative")
        if self._zeros:
            negative = tuple(torch.zeros_like(each) for each in negative)
        return tuple(each for pair in zip(positive, negative) for each in pair)

    def _encode(self, prompt: str, name: str) -> tuple[Tensor, ...]:
        parts, states, pooled = parse_prompt(prompt, name), [], []
        for tokenizer, encoder in self._encoders:
            ids, weights = self._chunks(tokenizer, encoder, parts)
            output = encoder(ids.to(encoder.device), output_hidden_states=True)
            states.append(_weighted(self._layer(encoder, output), weights).flatten(0, 1)[None])
            pooled = [output[0][:1]]  # SDXL's second encoder gives it first; that of the first chunk, as in the WebUIs
        return (torch.cat(states, -1), *(pooled if self._xl else ()))

    def _layer(self, encoder: Any, output: Any) -> Tensor:
        if self._xl:
            return output.hidden_states[-self._skip]
        if self._skip == 1:
            return output.last_hidden_state
        return getattr(encoder, "text_model", encoder).final_layer_norm(output.hidden_states[-self._skip])

    @staticmethod
    def _chunks(tokenizer: Any, encoder: Any, parts: Sequence[Sequence[Weighted]]) -> tuple[Tensor, Tensor]:
        """(numbers of tokens (n, 77), weights (n, 77)): each chunk begins and ends as a prompt of its own."""
        # A tokenizer whose configuration does not say how long a text may be says 1e30.
        most = min(tokenizer.model_max_length, encoder.config.max_position_embeddings) - 2
        comma, end, pad = tokenizer.get_vocab().get(",</w>"), tokenizer.eos_token_id, tokenizer.pad_token_id
        chunks: list[list[tuple[int, float]]] = []
        for number, part in enumerate(parts):
            chunk: list[tuple[int, float]] = []
            last = None
            for token, weight in _tokens(tokenizer, part):
                if token == comma:
                    last = len(chunk)
                elif len(chunk) == most and last is not None and most - last <= BACKTRACK:
                    chunks.append(chunk[: last + 1])
                    chunk, last = chunk[last + 1 :], None
                if len(chunk) == most:
                    chunks.append(chunk)
                    chunk, last = [], None
                chunk.append((token, weight))
            if chunk or number < len(parts) - 1 or not chunks:
                chunks.append(chunk)
        ids, weights = [], []
        for chunk in chunks:
            rest = most - len(chunk)
            ids.append([tokenizer.bos_token_id, *(token for token, _ in chunk), end, *[pad] * rest])
            weights.append([1.0, *(weight for _, weight in chunk), *[1.0] * (rest + 1)])
        return torch.tensor(ids), torch.tensor(weights)


def _tokens(tokenizer: Any, texts: Sequence[Weighted]) -> list[tuple[int, float]]:
    return [
        (token, weight)
        for text, weight in texts
        for token in tokenizer(text, truncation=False, add_special_tokens=False, verbose=False).input_ids
    ]


def _weighted(states: Tensor, weights: Tensor) -> Tensor:
    """Hidden states (n, 77, D) times weights (n, 77), every chunk with the mean that it had (A1111's "Original")."""
    if (weights == 1).all():
        return states
    before = states.float()
    after = before * weights[..., None].to(before)
    mean = after.mean((1, 2), keepdim=True)
    factor = torch.where(mean == 0, 1.0, before.mean((1, 2), keepdim=True) / mean)
    return (after * factor).to(states.dtype)


def by_length(words: Sequence[tuple[Tensor, ...]], size: int) -> list[list[int]]:
    """Numbers of the UNet's rows, those whose embeddings (1, n, D) are of one length together, at most `size` at once.

    A prompt that is padded to the length of another one gives another image.
    """
    alike: dict[int, list[int]] = {}
    for number, own in enumerate(words):
        alike.setdefault(own[0].shape[1] if own else 0, []).append(number)
    return [rows[start : start + size] for rows in alike.values() for start in range(0, len(rows), size)]
