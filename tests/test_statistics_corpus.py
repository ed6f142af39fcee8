import hashlib
import itertools
import json

import pytest
from statistics_helpers import TEXTS, make_tokenizer

from covariance_cache.corpus import Documents, TextFile, packed_windows, prompt_prefix
from covariance_cache.errors import CorpusError, StatisticsMismatch


def windows(source=TEXTS, tokenizer=None, seed=None, length=16, budget=10**6, **more):
    return list(
        packed_windows(
            tokenizer or make_tokenizer(),
            Documents(source, seed=seed),
            length=length,
            budget=budget,
            **more,
        )
    )


def test_txt_documents_are_separated_by_blank_lines(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n\nfirst\nline two\n\n \t\n\nsecond\r\nx\r\n\r\nth\xc3\xafrd")
    texts = TextFile(path)
    assert list(texts) == ["first\nline two", "second\nx", "thïrd"]
    assert texts[1].startswith("second")
    assert texts.where(1) == f"{path}, line 8"


def test_jsonl_documents_are_a_field_of_each_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"body": text, "id": 1}) for text in ("one", "two\n\nmore")]
    path.write_text("\ufeff" + "\n\n".join(lines), encoding="utf-8")
    assert list(TextFile(path, "body")) == ["one", "two\n\nmore"]
    with pytest.raises(CorpusError, match=r"line 3: no field 'text'.*body"):
        TextFile(path)[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"x", "ends in .txt or .jsonl"),
        ("a.txt", b"x\n\n\xff\xfe", r"a.txt, line 3: .*codec"),
        ("a.jsonl", b'{"text": "x"}\n{"text"', r"a.jsonl, line 2: "),
        ("a.jsonl", b'{"text": 7}', r"line 1: expected text, found int"),
    ],
)
def test_bad_files_are_refused_by_name_and_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        windows(path)


def test_bad_sources_are_refused(tmp_path):
    with pytest.raises(CorpusError, match=r"none\.txt: cannot be read"):
        windows(str(tmp_path / "none.txt"))
    with pytest.raises(CorpusError, match="list of strings"):
        windows("a text instead of a path")
    with pytest.raises(CorpusError, match="mapping"):
        windows({"text": "x"})
    with pytest.raises(CorpusError, match="document 1 of the text: expected text"):
        windows(["fine", None])
    with pytest.raises(CorpusError, match="pass seed=None"):
        windows(iter(TEXTS), seed=0)


@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("bos", [False, True])
def test_windows_hold_every_token_once_after_the_prefix(seed, bos):
    tokenizer = make_tokenizer(bos=bos)
    found = windows(tokenizer=tokenizer, seed=seed)
    assert {len(window.ids) for window in found[:-1]} == {16}
    assert 0 < len(found[-1].ids) <= 16
    prefix = [tokenizer.bos_token_id] * bos
    assert all(window.ids[: len(prefix)] == prefix for window in found)
    stream = [token for window in found for token in window.ids[len(prefix) :]]
    expected = [
        token
        for text in Documents(TEXTS, seed=seed)
        for token in [
            *tokenizer(text, add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
    ]
    assert stream == expected
    assert found[-1].end.used == sum(len(window.ids) for window in found)


def test_the_seed_decides_the_order_alone():
    orders = [list(Documents(TEXTS, seed=seed)) for seed in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(TEXTS) != orders[0]
    assert list(Documents(TEXTS, seed=None)) == TEXTS
    assert windows(seed=0)[-1].end == windows(seed=0)[-1].end
    assert windows(seed=0)[-1].end.token_digest != windows(seed=1)[-1].end.token_digest


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, []),
        ({"bos": True}, [0]),
        ({"bos": True, "eos": True}, [0]),
        ({"eos": True}, []),
    ],
)
def test_the_prefix_is_what_the_tokenizer_does_not_what_it_has(settings, expected):
    tokenizer = make_tokenizer(**settings)
    assert tokenizer.bos_token_id == 0
    assert prompt_prefix(tokenizer) == expected


@pytest.mark.parametrize("budget", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize("bos", [False, True])
def test_the_budget_is_met_exactly(budget, bos):
    found = windows(tokenizer=make_tokenizer(bos=bos), budget=budget)
    assert sum(len(window.ids) for window in found) == budget
    assert found[-1].end.used == budget
    assert len(found) == -(-budget // 16)


def test_an_endless_source_is_read_no_further_than_needed():
    taken = []

    def endless():
        for number in itertools.count():
            taken.append(number)
            yield f"text {number}"

    assert sum(len(window.ids) for window in windows(endless(), budget=100)) == 100
    assert len(taken) < 20


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("length", [5, 64, 1000])
def test_reading_goes_on_from_every_cursor(bos, length):
    # Documents shorter and longer than a window, empty ones, and one at the end.
    texts = ["", *TEXTS[:4], "", "x" * 150, "y", ""]
    settings = {"tokenizer": make_tokenizer(bos=bos), "length": length, "budget": 400}
    whole = windows(texts, seed=5, **settings)
    for number, window in enumerate(whole, start=1):
        rest = windows(texts, seed=5, start=window.end, **settings)
        assert rest == whole[number:]


def test_a_cursor_of_another_text_is_refused():
    cursor = windows(seed=0)[20].end
    changed = [text.replace("Document 7", "Document seven") for text in TEXTS]
    with pytest.raises(StatisticsMismatch, match="not the one that was read before"):
        windows(changed, seed=0, start=windows(seed=0)[-1].end)
    with pytest.raises(StatisticsMismatch, match="not the one that was read before"):
        windows(seed=1, start=cursor)
    with pytest.raises(StatisticsMismatch, match="its end"):
        windows(TEXTS[:1], start=windows()[-1].end)


def test_the_fingerprint_is_of_the_tokens_used_and_chained():
    found = windows(["abc", "defgh"], length=4)
    assert [len(window.ids) for window in found] == [4, 4, 2]
    digest = hashlib.sha256(b"").digest()
    for window in found:
        data = b"".join(token.to_bytes(8, "little") for token in window.ids)
        digest = hashlib.sha256(digest + data).digest()
    assert found[-1].end.token_digest == digest.hex()
    # What was not used does not count.
    longer = windows(["abc", "defgh" * 9], length=4, budget=8)
    assert longer[-1].end.token_digest == found[1].end.token_digest


def test_a_window_must_have_room_for_text():
    with pytest.raises(CorpusError, match="window of 1 has no room"):
        windows(tokenizer=make_tokenizer(bos=True), length=1)
