"""Edits and the files they come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from model_kit import DATA

from unified_edit.edits import (
    Edit,
    Record,
    check_edits,
    edits_of,
    fill,
    read_edits,
    read_records,
    records_of,
)
from unified_edit.errors import EditError, UnifiedEditError

RECORD = {
    "case_id": 7,
    "requested_rewrite": {
        "prompt": "{} was born in",
        "subject": "Ada",
        "relation_id": "P19",
        "target_new": {"str": "Oslo"},
        "target_true": {"str": "London "},
    },
    "paraphrase_prompts": ["Ada's birthplace is"],
    "neighborhood_prompts": ["Bo was born in", "Carla was born in"],
    "attribute_prompts": ["Dov was born in"],
    "generation_prompts": ["Ada comes from"],
}


def write_lines(path: Path, entries: list[object]) -> Path:
    lines = [json.dumps(entry, ensure_ascii=False) for entry in entries]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_both_ways_to_name_the_subject_give_the_same_text() -> None:
    slot = Edit("{} plays the", "LeBron James", "violin")
    plain = Edit("LeBron James plays the", "LeBron James", "violin")
    assert slot.text == plain.text == "LeBron James plays the"
    assert slot.template == plain.template == "{} plays the"


@pytest.mark.parametrize(
    ("template", "subject", "text"),
    [
        ("{} is 100% {sure} of", "Ada", "Ada is 100% {sure} of"),
        ("%s and {0} know {}", "B%d {x}", "%s and {0} know B%d {x}"),
        ("{{}}", "Ada", "{Ada}"),
        ("\\1 {} \\g<0>", "a\\2", "\\1 a\\2 \\g<0>"),
    ],
)
def test_braces_percent_signs_and_backslashes_are_plain_text(
    template: str, subject: str, text: str
) -> None:
    edit = Edit(template, subject, "x")
    assert edit.text == text
    filled, end = fill(template, subject)
    assert filled == text and text[:end].endswith(subject)


def test_the_subject_in_a_slot_may_be_elsewhere_too() -> None:
    assert Edit("Ada said that {} likes", "Ada", "x").text == "Ada said that Ada likes"


@pytest.mark.parametrize(
    ("prompt", "subject", "target", "message"),
    [
        ("", "Ada", "x", "prompt is empty"),
        ("{} is", "", "x", "subject is empty"),
        ("{} is", "Ada", "", "target is empty"),
        ("{} is", "Ada", " \n", "target is empty"),
        ("{} is", "  ", "x", "subject is empty"),
        ("{} is", "Ada", " x", "target begins or ends with space"),
        ("{} is", "Ada", "x\n", "target begins or ends with space"),
        ("{} is ", "Ada", "x", "prompt ends with space"),
        ("{} is", "Ada ", "x", "subject begins or ends with space"),
        ("{} is", " Ada", "x", "subject begins or ends with space"),
        ("{} and {} are", "Ada", "x", "2 slots"),
        ("Bo is", "Ada", "x", "subject is not in the prompt"),
        ("ada is", "Ada", "x", "same spelling and case"),
        ("Ada and Ada are", "Ada", "x", "2 times"),
        (None, "Ada", "x", "prompt is empty"),
        ("{} is", "Ada", 3, "target is empty"),
    ],
)
def test_malformed_edits_are_refused(
    prompt: str, subject: str, target: str, message: str
) -> None:
    with pytest.raises(EditError, match=message):
        Edit(prompt, subject, target)


def test_edit_errors_are_of_the_family() -> None:
    assert issubclass(EditError, UnifiedEditError) and issubclass(EditError, ValueError)


def test_filling_a_template_without_slot_is_refused() -> None:
    with pytest.raises(EditError, match="no slot"):
        fill("Ada is", "Ada")


def test_no_edits_are_refused() -> None:
    with pytest.raises(EditError, match="no edits"):
        check_edits([])


def test_a_repeated_edit_is_named_by_index_even_if_written_otherwise() -> None:
    edits = [
        Edit("{} is", "Bo", "x"),
        Edit("{} is", "Ada", "x"),
        Edit("Ada is", "Ada", "x"),
    ]
    with pytest.raises(EditError, match="edit 2 repeats edit 1.*'Ada is' → 'x'"):
        check_edits(edits)


def test_contradicting_edits_are_named_by_index() -> None:
    edits = [Edit("{} is", name, "x") for name in ("Ada", "Bo")]
    edits.append(Edit("{} is", "Ada", "y"))
    with pytest.raises(EditError, match="edits 0 and 2 contradict.*'x' and → 'y'"):
        check_edits(edits)


def test_one_subject_may_have_several_edits() -> None:
    check_edits([Edit("{} is", "Ada", "x"), Edit("{} was", "Ada", "y")])


def test_own_form_round_trips(tmp_path: Path) -> None:
    edits = [
        Edit("{} plays", "Ada", "the cello"),
        Edit("“{}” lives in", "Zoë 李\u2028Ng", "São Paulo"),
        Edit("{} is", "Bo", "{}"),
    ]
    path = write_lines(tmp_path / "edits.jsonl", [e.as_dict() for e in edits])
    assert read_edits(path) == edits


def test_line_separators_inside_strings_do_not_cut_lines(tmp_path: Path) -> None:
    # JSON allows these raw in strings; str.splitlines() would cut at each of them.
    prompt = "a\u2028b\u2029c\x85d {} is"
    path = write_lines(
        tmp_path / "edits.jsonl", [{"prompt": prompt, "subject": "Ada", "target": "x"}]
    )
    assert read_edits(path) == [Edit(prompt, "Ada", "x")]


def test_blank_lines_and_windows_line_ends_are_fine(tmp_path: Path) -> None:
    line = json.dumps(Edit("{} is", "Ada", "x").as_dict())
    path = tmp_path / "edits.jsonl"
    path.write_bytes(f"\r\n{line}\r\n\r\n".encode())
    assert read_edits(path) == [Edit("{} is", "Ada", "x")]


def test_easyedit_flat_form(tmp_path: Path) -> None:
    entry = {
        "case_id": 3,
        "prompt": "The mother tongue of Danielle Darrieux is",
        "target_new": "English",
        "subject": "Danielle Darrieux",
        "ground_truth": "French",
        "rephrase_prompt": "Danielle Darrieux speaks",
    }
    expected = [Edit("The mother tongue of {} is", "Danielle Darrieux", "English")]
    for path in (tmp_path / "flat.jsonl", tmp_path / "flat.json"):
        if path.suffix == ".jsonl":
            write_lines(path, [entry])
        else:
            path.write_text(json.dumps([entry]), encoding="utf-8")
        (read,) = read_edits(path)
        assert (read.text, read.target) == (expected[0].text, expected[0].target)
        assert read.template == expected[0].template


REQUEST = {
    "case_id": 0,
    "prompt": "{} plays the",
    "subject": "LeBron James",
    "target_new": {"str": " violin", "id": "Q1"},
    "target_true": {"str": "basketball"},
}
FLAT = {
    "prompt": "LeBron James plays the",
    "subject": "LeBron James",
    "target_new": " violin",
    "portability": {"Reasoning": [{"prompt": "x", "ground_truth": [["y"]]}]},
}
ZSRE = {
    "subject": "LeBron James",
    "src": "What does LeBron James play?",
    "pred": "golf",
    "rephrase": "Which game does LeBron James play?",
    "alt": "the violin",
    "answers": ["basketball"],
    "loc": "nq question: who",
    "loc_ans": "me",
}


def test_requests_of_other_tools_are_the_same_edit(tmp_path: Path) -> None:
    expected = Edit("{} plays the", "LeBron James", "violin")
    path = write_lines(tmp_path / "edits.jsonl", [REQUEST, FLAT])
    for edits in (read_edits(path), edits_of([REQUEST, FLAT])):
        assert [(e.template, e.subject, e.target) for e in edits] == [
            (expected.template, expected.subject, expected.target)
        ] * 2
    # The project's own form means what it says.
    with pytest.raises(EditError, match=r"entry 0.*target begins or ends with space"):
        edits_of([{**expected.as_dict(), "target": " violin"}])


def test_zsre_questions(tmp_path: Path) -> None:
    path = tmp_path / "zsre.json"
    path.write_text(json.dumps([ZSRE]), encoding="utf-8")
    (edit,) = read_edits(path)
    assert edit.template == "What does {} play?" and edit.target == "the violin"
    assert edits_of([ZSRE]) == [edit]


def test_parallel_lists_of_easyedit(tmp_path: Path) -> None:
    lists = {
        "prompts": ["Ada plays", "Bo lives in"],
        "subject": ["Ada", "Bo"],
        "target_new": ["chess", " Oslo"],
        "ground_truth": ["golf"],
    }
    expected = [Edit("Ada plays", "Ada", "chess"), Edit("Bo lives in", "Bo", "Oslo")]
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(lists), encoding="utf-8")
    assert read_edits(path) == edits_of(lists) == expected
    one = {"prompts": "Ada plays", "subject": "Ada", "target_new": "chess"}
    assert edits_of(one) == expected[:1]


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        (
            {"prompts": ["Ada is"], "subject": ["Ada", "Bo"], "target_new": ["x"]},
            "one length; there are 1 in 'prompts', 2 in 'subject', 1 in 'target_new'",
        ),
        ({"prompts": ["Ada is"], "target_new": ["x"]}, "the field 'subject'"),
        ({"prompts": [], "subject": [], "target_new": 5}, "the field 'target_new'"),
        (
            {"prompts": ["Ada is", 5], "subject": ["Ada"] * 2, "target_new": ["x"] * 2},
            "entry 1: lacks or misuses the field 'prompt': not a text: 5",
        ),
    ],
)
def test_parallel_lists_that_are_none(
    tmp_path: Path, lists: dict[str, object], message: str
) -> None:
    path = tmp_path / "lists.json"
    path.write_text(json.dumps(lists), encoding="utf-8")
    with pytest.raises(EditError) as caught:
        read_edits(path)
    assert message in str(caught.value) and str(path) in str(caught.value)
    with pytest.raises(EditError) as caught:
        edits_of(lists)
    assert message in str(caught.value)


def test_lists_without_edits_are_none() -> None:
    assert edits_of([]) == edits_of(iter([])) == []
    with pytest.raises(EditError, match="lacks or misuses the field 'prompts'"):
        edits_of({"requests": [REQUEST]})


def test_counterfact_records(tmp_path: Path) -> None:
    path = tmp_path / "records.json"
    path.write_text(json.dumps([RECORD]), encoding="utf-8")
    expected = Record(
        edit=Edit("{} was born in", "Ada", "Oslo"),
        target_true="London",
        paraphrase_prompts=("Ada's birthplace is",),
        neighborhood_prompts=("Bo was born in", "Carla was born in"),
        attribute_prompts=("Dov was born in",),
        generation_prompts=("Ada comes from",),
        relation="P19",
        case_id=7,
    )
    assert read_records(path) == [expected] == records_of([RECORD])
    assert read_edits(path) == [expected.edit]


def test_records_may_lack_prompts(tmp_path: Path) -> None:
    bare = {"requested_rewrite": RECORD["requested_rewrite"]}
    (record,) = records_of([bare])
    assert record.paraphrase_prompts == record.neighborhood_prompts == ()


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"prompt": "{} is", "subject": "Ada"}, "field 'target_new'"),
        ({"prompt": "Bo is", "subject": "Ada", "target": "x"}, "not in the prompt"),
        ({"requested_rewrite": "text"}, "lacks or misuses"),
        (
            {**REQUEST, "target_new": {"id": "Q1"}},
            "'target_new': it has no 'str'",
        ),
        (
            {**REQUEST, "target_new": {"str": 5}},
            "'target_new.str': not a text: 5",
        ),
        ({**REQUEST, "target_new": ["x"]}, "field 'target_new': not a text"),
        ({**REQUEST, "subject": None}, "field 'subject': not a text: None"),
        ({**ZSRE, "alt": None}, "field 'alt': not a text: None"),
        ({"src": "Ada?", "subject": "Ada"}, "field 'alt'"),
        (
            {
                **RECORD,
                "requested_rewrite": {
                    **RECORD["requested_rewrite"],
                    "target_new": {"str": 5},
                },
            },  # type: ignore[dict-item]  # noqa: E501
            "lacks or misuses",
        ),
        ({**RECORD, "paraphrase_prompts": "Ada is"}, "must be a list of texts"),
        ({**RECORD, "neighborhood_prompts": [1]}, "must be a list of texts"),
    ],
)
def test_bad_entries_are_named_by_file_and_index(
    tmp_path: Path, entry: object, message: str
) -> None:
    good = {"prompt": "{} is", "subject": "Ada", "target": "x"}
    path = write_lines(tmp_path / "edits.jsonl", [good, entry])
    with pytest.raises(EditError, match=r"edits\.jsonl, entry 1.*") as caught:
        read_edits(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("edits.jsonl", b'{"prompt": ', "not valid JSON"),
        ("edits.json", b"\xff\xfe", "not valid JSON"),
        ("edits.json", b'{"prompt": "x"}', "list of JSON objects"),
        ("edits.json", b'["x"]', "list of JSON objects"),
    ],
)
def test_malformed_files_are_named(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(EditError, match=message) as caught:
        read_edits(path)
    assert name in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(EditError, match=r"absent\.jsonl: cannot be read"):
        read_edits(tmp_path / "absent.jsonl")


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
def test_every_genuine_counterfact_case_is_read() -> None:
    path = DATA / "counterfact" / "flat.jsonl"
    edits = read_edits(path)
    assert len(edits) == 21_719
    raw = map(json.loads, path.read_text(encoding="utf-8").strip().split("\n"))
    for edit, entry in zip(edits, raw, strict=True):
        assert edit.text == entry["prompt"]
        assert edit.target == entry["target_new"]


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
def test_every_genuine_zsre_question_is_read_or_refused_for_a_reason() -> None:
    path = DATA / "zsre_eval_1037.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert len(raw) == 1037
    edits = read_edits(path)  # none of these is refused
    for edit, entry in zip(edits, raw, strict=True):
        assert (edit.text, edit.target) == (entry["src"], entry["alt"].strip())
        assert edit.template.count(edit.subject) == 0
    # What another file may hold is refused with its reason.
    for question, message in (
        ("Who is it?", "subject is not in the prompt"),
        ("{subject} or {subject}?", "subject is in the prompt 2 times"),
    ):
        for entry in raw:
            made = {**entry, "src": question.replace("{subject}", entry["subject"])}
            with pytest.raises(EditError, match=message):
                edits_of([made])


@pytest.mark.data
@pytest.mark.skipif(not DATA.is_dir(), reason=f"no data sets in {DATA}")
def test_genuine_records_keep_every_prompt() -> None:
    path = DATA / "counterfact" / "full_300.json"
    records, raw = read_records(path), json.loads(path.read_text(encoding="utf-8"))
    assert len(records) == 300
    for record, entry in zip(records, raw, strict=True):
        rewrite = entry["requested_rewrite"]
        assert record.edit.text == rewrite["prompt"].replace("{}", rewrite["subject"])
        assert record.target_true == rewrite["target_true"]["str"]
        assert record.case_id == entry["case_id"]
        for name in ("paraphrase", "neighborhood", "attribute", "generation"):
            field = f"{name}_prompts"
            assert list(getattr(record, field)) == entry[field]
    assert read_edits(path) == [record.edit for record in records]
