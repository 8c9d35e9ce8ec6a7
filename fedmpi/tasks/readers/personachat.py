"""PersonaChat (Zhang et al. 2018) from the JSON file of the ConvAI2 baseline: ``personachat_self_original.json``.

``{"train": […], "valid": […]}``, each a list of dialogues ``{"personality": [sentences], "utterances":
[{"history": [sentences], "candidates": [sentences]}]}``; the last candidate is what the person really said.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from pydantic import Field, PositiveInt

from fedmpi.errors import DataError
from fedmpi.tasks.dataset import IGNORE, PAD, Data, Places, Split, locate, numbered
from fedmpi.tasks.hf import tokenizer
from fedmpi.tasks.readers.lines import kind, read_json
from fedmpi.tasks.readers.text import TextOptions, stacked

FILE = "personachat_self_original.json"


class ChatOptions(TextOptions):
    length: PositiveInt = Field(256, description="tokens that are kept of a sample, its last ones")
    history: PositiveInt = Field(5, description="utterances before the reply that are kept")


def personachat(options: ChatOptions, places: Places) -> Data:
    """A sample is the personality, the last utterances and the reply, each ended by the tokenizer's end mark;
    only the reply's tokens are targets. The natural groups are the personalities."""
    remedy = f"Put it into {places[0]}/personachat"
    folder = locate("personachat", places, (FILE,), (), remedy)
    content, tokenize = read_json(folder / FILE), tokenizer(options.tokenizer, places)
    end = tokenize.eos_token_id if tokenize.eos_token_id is not None else tokenize.sep_token_id
    if end is None:
        raise DataError(f"data.tokenizer: expected one with an end mark, {options.tokenizer} has none")
    cache: dict[str, list[int]] = {}

    def encode(sentence: str) -> list[int]:
        if sentence not in cache:
            cache[sentence] = [*tokenize.encode(sentence, add_special_tokens=False), end]
        return cache[sentence]

    splits = []
    for part in ("train", "valid"):
        rows, persons = [], []
        for number, dialogue in enumerate(_dialogues(folder / FILE, content, part)):
            persona, turns = _checked(folder / FILE, part, number, dialogue)
            for history, reply in turns:
                context = [
                    token for line in (*persona, *history[-options.history :]) for token in encode(line)
                ]
                rows.append(_row(context, encode(reply), options.length))
                persons.append("\n".join(persona))
        x, y = stacked([ids for ids, _ in rows]), stacked([targets for _, targets in rows], IGNORE)
        splits.append(Split(x, y, numbered(persons)))
    longest = max(split.x.shape[1] for split in splits)
    train, test = (_padded(split, longest) for split in splits)
    return Data("personachat", train, test, len(tokenize))


def _row(context: list[int], reply: list[int], length: int) -> tuple[list[int], list[int]]:
    """The last ``length`` tokens and, for those of the reply, the same as targets. A reply that fills them all
    keeps its beginning, and one token of the context, without which its first would be predicted from nothing."""
    reply = reply[: max(1, length - 1)]
    context = context[len(context) - min(len(context), length - len(reply)) :]
    return context + reply, [IGNORE] * len(context) + reply


def _padded(split: Split, longest: int) -> Split:
    width = (0, longest - split.x.shape[1])
    pad = torch.nn.functional.pad
    return split._replace(x=pad(split.x, width, value=PAD), y=pad(split.y, width, value=IGNORE))


def _dialogues(path: Path, content: Any, part: str) -> list[Any]:
    dialogues = content.get(part) if isinstance(content, dict) else None
    if not isinstance(dialogues, list) or not dialogues:
        raise DataError(f"{path}: expected an object with lists train and valid, got {kind(content)}")
    return dialogues


def _checked(
    path: Path, part: str, number: int, dialogue: Any
) -> tuple[list[str], list[tuple[list[str], str]]]:
    """The personality, and the history and the reply of each utterance."""
    try:
        persona = _texts(dialogue["personality"])
        turns = [
            (_texts(turn["history"]), _texts(turn["candidates"])[-1])
            for turn in _list(dialogue["utterances"])
        ]
        if not persona or not turns or not all(history for history, _ in turns):
            raise ValueError("an empty list")
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise DataError(
            f"{path}: {part}, dialogue {number}: expected personality and utterances with history and "
            f"candidates, got {type(error).__name__}: {error}"
        ) from error
    return persona, turns


def _texts(value: Any) -> list[str]:
    strange = next((line for line in _list(value) if not isinstance(line, str)), "")
    if strange != "":
        raise TypeError(f"{type(strange).__name__} instead of a sentence")
    return _list(value)


def _list(value: Any) -> list[Any]:
    """A sentence is a sequence, too: its letters would be taken for sentences."""
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} instead of a list")
    return value
