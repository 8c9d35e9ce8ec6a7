"""Readers of text: small files in each one's exact format, and the same truncated, corrupt or missing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from fedmpi.errors import ConfigError, DataError
from fedmpi.tasks.data import Data, load
from fedmpi.tasks.dataset import IGNORE, PAD

from .formats import WORDS, personachat, words


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A BERT tokenizer of a dozen words."""
    pytest.importorskip("transformers", reason="the extra hf is not installed")
    return words(tmp_path / "tokenizer")


def rows(data: Data) -> list[list[str]]:
    return [[WORDS[i] for i in row if i != PAD] for row in data.train.x.tolist()]


class TestSst2:
    def test_sentences_and_padding(self, tmp_path: Path, tokenizer: Path) -> None:
        (tmp_path / "train.tsv").write_text("sentence\tlabel\na good film .\t1\nbad\t0\n")
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\ni like a good good bad film\t1\n")
        got = load("sst-2", tmp_path, tokenizer=str(tokenizer), length=8)
        assert rows(got) == [["[CLS]", "a", "good", "film", ".", "[SEP]"], ["[CLS]", "bad", "[SEP]"]]
        assert got.train.y.tolist() == [1, 0]
        assert got.train.x.dtype == torch.int64
        assert got.test.x.shape == (1, 8), "cut to the length"
        assert got.test.x[0, -1] == WORDS.index("[SEP]"), "the end mark stays"

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("a film\t1\n", "expected a line 'sentence<tab>label'"),
            ("", "expected a line"),
            ("sentence\tlabel\na film\t2\n", "line 2: expected a sentence, a tab and 0 or 1"),
            ("sentence\tlabel\na film\t1\na fil", "line 3: expected a sentence"),
            ("sentence\tlabel\na\tfilm\t1\n", "line 2: expected a sentence"),
            ("sentence\tlabel\n \t1\n", "line 2: expected a sentence"),
            ("sentence\tlabel\na\t1\rfilm\t1\n", "line 2: expected a sentence"),
        ],
    )
    def test_damaged(self, tmp_path: Path, tokenizer: Path, content: str, message: str) -> None:
        (tmp_path / "dev.tsv").write_text("sentence\tlabel\nbad\t0\n")
        (tmp_path / "train.tsv").write_text(content)
        with pytest.raises(DataError, match=rf"{tmp_path / 'train.tsv'}.*{message}"):
            load("sst-2", tmp_path, tokenizer=str(tokenizer))

    def test_no_tokenizer(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        for name in ("train", "dev"):
            (tmp_path / f"{name}.tsv").write_text("sentence\tlabel\nbad\t0\n")
        with pytest.raises(ConfigError, match=r"data\.tokenizer: expected a folder .* got '/none/such'"):
            load("sst-2", tmp_path, tokenizer="/none/such")
        with pytest.raises(ConfigError, match=r"data sst-2\.tokenizer: required"):
            load("sst-2", tmp_path)


class TestMovieReviews:
    FILE = "movieReviewSnippets_GroundTruth.txt"

    def test_ratings_become_labels(self, tmp_path: Path, tokenizer: Path) -> None:
        lines = [
            f"{i}\t{rating}\ta {'good' if rating > 0 else 'bad'} film\r"
            for i, rating in enumerate([1.5, -2.25] * 10)
        ]
        (tmp_path / self.FILE).write_text("\n".join([*lines, "20\t0.0\tfilm\r"]) + "\n")
        got = load("movie-reviews", tmp_path, tokenizer=str(tokenizer))
        assert (len(got.train.y), len(got.test.y)) == (16, 4), "a rating of 0 is left out"
        for said, label in zip(rows(got), got.train.y.tolist(), strict=True):
            assert said == ["[CLS]", "a", "good" if label else "bad", "film", "[SEP]"]
        again = load("movie-reviews", tmp_path, tokenizer=str(tokenizer), neutral=2)
        assert set(again.train.y.tolist()) == {0}

    @pytest.mark.parametrize(
        "line",
        ["1\t1.5", "1\tx\tfilm", "1\t4.5\tfilm", "1\tnan\tfilm", "1\t1\t ", "", "1\t0_1\tfilm", "1\t٣\tfilm"],
    )
    def test_damaged(self, tmp_path: Path, tokenizer: Path, line: str) -> None:
        (tmp_path / self.FILE).write_text(f"0\t1\tfilm\n{line}\n2\t1\tfilm\n")
        with pytest.raises(DataError, match=rf"{self.FILE}, line 2: expected a number, a rating in -4 to 4"):
            load("movie-reviews", tmp_path, tokenizer=str(tokenizer))

    def test_missing(self, tmp_path: Path, tokenizer: Path) -> None:
        with pytest.raises(DataError, match="Run: fedmpi data fetch movie-reviews"):
            load("movie-reviews", tmp_path, tokenizer=str(tokenizer))


class TestPersonaChat:
    def test_only_the_reply_is_a_target(self, tmp_path: Path, tokenizer: Path) -> None:
        personachat(tmp_path)
        got = load("personachat", tmp_path, tokenizer=str(tokenizer), history=1)
        assert rows(got)[0] == [
            "i",
            "like",
            "tea",
            ".",
            "[SEP]",
            "i",
            "like",
            "[SEP]",
            "a",
            "good",
            "film",
            "[SEP]",
        ]
        targets = [WORDS[i] for i in got.train.y[0].tolist() if i != IGNORE]
        assert targets == ["a", "good", "film", "[SEP]"]
        assert got.train.y[0, :8].tolist() == [IGNORE] * 8
        assert got.train.groups is not None
        assert got.train.groups.tolist() == [0, 1, 0], "one client a personality"
        assert got.classes == len(WORDS)
        short = load("personachat", tmp_path, tokenizer=str(tokenizer), history=1, length=3)
        assert rows(short)[0] == ["[SEP]", "a", "good"]

    @pytest.mark.parametrize(
        "changes",
        [
            {"history": []},
            {"candidates": []},
            {"candidates": [3]},
            {"history": 4},
            {"history": "tea"},
            {"candidates": "tea"},
        ],
    )
    def test_wrong_dialogues(self, tmp_path: Path, tokenizer: Path, changes: dict[str, Any]) -> None:
        path = personachat(tmp_path, **changes)
        with pytest.raises(
            DataError, match=rf"{path}: train, dialogue 0: expected personality and utterances"
        ):
            load("personachat", tmp_path, tokenizer=str(tokenizer))

    def test_truncated_and_foreign(self, tmp_path: Path, tokenizer: Path) -> None:
        path = personachat(tmp_path)
        path.write_text(path.read_text()[:50])
        with pytest.raises(DataError, match=f"{path}: expected JSON"):
            load("personachat", tmp_path, tokenizer=str(tokenizer))
        path.write_text("[1]")
        with pytest.raises(
            DataError, match=f"{path}: expected an object with lists train and valid, got list"
        ):
            load("personachat", tmp_path, tokenizer=str(tokenizer))


class TestHub:
    def test_a_folder_of_tables(
        self, tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pytest.importorskip("datasets", reason="the extra hf is not installed")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        tables = tmp_path / "tables"
        tables.mkdir()
        (tables / "train.csv").write_text("line,mood,who\na good film,up,ann\nbad,down,bob\ngood,up,ann\n")
        (tables / "test.csv").write_text("line,mood,who\nbad film,down,cy\n")
        options = {"dataset": str(tables), "input": "line", "target": "mood", "tokenizer": str(tokenizer)}
        got = load("hub", tmp_path, group="who", **options)
        assert rows(got)[1] == ["[CLS]", "bad", "[SEP]"]
        assert got.train.y.tolist() == [1, 0, 1]
        assert got.test.y.tolist() == [0]
        assert got.train.groups is not None
        assert got.train.groups.tolist() == [0, 1, 0]
        assert got.test.groups is not None
        assert got.test.groups.tolist() == [2], "somebody else than in training"
        with pytest.raises(DataError, match="expected a column 'sentence', got line, mood, who"):
            load("hub", tmp_path, **{**options, "input": "sentence"})
        with pytest.raises(DataError, match=r"data\.dataset: expected a hub name .* got '/none/such'"):
            load("hub", tmp_path, dataset="/none/such")

    def test_several_columns_of_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        tables = tmp_path / "tables"
        tables.mkdir()
        for part in ("train", "test"):
            (tables / f"{part}.csv").write_text("size,rooms,label\n1.5,2,0\n2.5,3,1\n")
        got = load("hub", tmp_path, dataset=str(tables), input=["size", "rooms"])
        assert got.train.x.tolist() == [[1.5, 2.0], [2.5, 3.0]]
        assert got.test.y.tolist() == [0, 1]
        with pytest.raises(DataError, match="expected a column 'colour', got size, rooms, label"):
            load("hub", tmp_path, dataset=str(tables), input=["size", "colour"])

    @pytest.mark.parametrize(
        ("file", "content", "message"),
        [
            (
                "train.json",
                '{"text": "a", "label": 1}\n{"text": "b", "la',
                "of whole tables, got .*Missing a closing quotation mark",
            ),
            ("train.parquet", "PAR1 and no more", "of whole tables, got .*not a parquet file"),
            (
                "train.csv",
                "text,label\na,1\nb",
                r"train, row 1: expected a value in column 'label', got none",
            ),
            ("train.csv", "text,label\na,1\nb,2,3,4\n", "of whole tables, got .*Expected 2 fields in line 3"),
            ("train.csv", "text,label\n", "whole tables|expected samples in train, got none"),
        ],
    )
    def test_damaged_tables(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, content: str, message: str
    ) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        tables = tmp_path / "tables"
        tables.mkdir()
        (tables / file).write_text(content)
        (tables / f"test.{file.split('.')[1]}").write_text(content)
        with pytest.raises(DataError, match=message) as error:
            load("hub", tmp_path, dataset=str(tables), tokenizer="x")
        assert str(tables) in str(error.value)

    def test_words_are_no_numbers(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        datasets = pytest.importorskip("datasets", reason="the extra hf is not installed")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        tables = tmp_path / "tables"
        tables.mkdir()
        for part in ("train", "test"):
            (tables / f"{part}.json").write_text(
                '{"text": ["1", "2"], "label": 0}\n{"text": ["3", "4"], "label": 1}\n'
            )
        with pytest.raises(DataError, match=r"text: expected pictures, sentences or lists .* values of str"):
            load("hub", tmp_path, dataset=str(tables))

    def test_what_would_not_end(self, tmp_path: Path) -> None:
        pytest.importorskip("datasets", reason="the extra hf is not installed")
        for name in ("train.csv", "test.csv"):
            (tmp_path / name).write_text("text,label\na,1\n")
        os.truncate(tmp_path / "test.csv", 1 << 42)
        with pytest.raises(DataError, match=r"test\.csv: expected at most 4294967296 bytes"):
            load("hub", tmp_path, dataset=str(tmp_path), tokenizer="x")
        (tmp_path / "test.csv").unlink()
        os.mkfifo(tmp_path / "test.csv")
        with pytest.raises(DataError, match=r"test\.csv: expected a plain file, got a pipe or a device"):
            load("hub", tmp_path, dataset=str(tmp_path), tokenizer="x", length=7)
