"""Which turns and parts the data ask to be trained or left out: every mask decoded back into text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from posttrain.data.doctor.check import check
from posttrain.data.prepare import Prepared, prepare
from posttrain.data.settings import DataSettings
from posttrain.data.view import PairView
from posttrain.data.view.pairs import any_view
from posttrain.errors import DataError
from tests.doctor_files import codes
from tests.tiny_tokenizers import chatml_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
QUESTION, ANSWER = {"role": "user", "content": "What is two plus two?"}, {"role": "assistant", "content": "Four."}
THANKS, WELCOME = {"role": "user", "content": "Thanks!"}, {"role": "assistant", "content": "You are welcome 🙂"}
END = "<|im_end|>\n"


def run(row: dict[str, Any], **settings: Any) -> Prepared:
    marked = settings.pop("marked", False)
    return prepare([row], chatml_tokenizer(marked=marked), DataSettings(**{"assistant_only": True, **settings}))


def trained(row: dict[str, Any], **settings: Any) -> list[str]:
    branch = run(row, **settings).samples[0][0].branches[0]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], branch.supervised.astype(int), [0]])))
    return [chatml_tokenizer().decode(branch.ids[start:end]) for start, end in edges.reshape(-1, 2)]


def messages(*flags: dict[str, Any]) -> dict[str, Any]:
    """The conversation with these flags, message by message."""
    turns = (SYSTEM, QUESTION, ANSWER, THANKS, WELCOME)
    return {"messages": [{**turn, **flag} for turn, flag in zip(turns, flags, strict=True)]}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("flag", [{"train": False}, {"weight": 0}, {"weight": 0.0}, {"training": False}, {"train": 0}])
def test_a_turn_left_out(flag: dict[str, Any], marked: bool) -> None:
    assert trained(messages({}, {}, flag, {}, {}), marked=marked) == ["You are welcome 🙂" + END]
    assert trained(messages({}, {}, {}, {}, flag), marked=marked) == ["Four." + END]


@pytest.mark.parametrize("marked", [False, True])
def test_flags_that_say_what_is_so_anyway(marked: bool) -> None:
    expected = ["Four." + END, "You are welcome 🙂" + END]
    assert trained(messages({}, {}, {}, {}, {}), marked=marked) == expected
    yes, no = {"train": True}, {"train": False}
    assert trained(messages(no, no, yes, no, yes), marked=marked) == expected
    assert trained(messages({}, {}, {"weight": 1, "train": None}, {}, {"weight": None}), marked=marked) == expected


def test_a_user_turn_is_trained_without_its_header() -> None:
    row = messages({}, {"train": True}, {"train": False}, {}, {})
    assert trained(row) == ["What is two plus two?" + END, "You are welcome 🙂" + END]


def test_whole_sequences_lose_the_turn_with_its_header() -> None:
    full = chatml_tokenizer().apply_chat_template([SYSTEM, QUESTION, ANSWER, THANKS, WELCOME], tokenize=False)
    before, _, rest = full.partition("<|im_start|>user\nThanks!<|im_end|>\n")
    assert trained(messages({}, {}, {}, {"train": False}, {}), assistant_only=False) == [before, rest]
    before, _, rest = full.partition("Four.<|im_end|>\n")
    assert trained(messages({}, {}, {"train": False}, {}, {}), assistant_only=False) == [before, rest]


def test_parts() -> None:
    parts = [
        {"type": "text", "text": "The capital of France", "train": False},
        {"type": "text", "text": " is Paris."},
    ]
    row = {"messages": [QUESTION, {"role": "assistant", "content": parts}]}
    assert trained(row) == [" is Paris." + END]
    parts[1]["train"] = True
    row = {"messages": [QUESTION, {"role": "assistant", "content": parts, "train": False}]}
    assert trained(row) == [" is Paris."]
    assert run(row).report.boundary_moved.count == 0


def test_ranges_of_characters_as_axolotl_writes_them() -> None:
    detail = [
        {"begin_offset": 0, "end_offset": 20, "train": False},
        {"begin_offset": 24, "end_offset": 30, "train": True},
    ]
    answer = {"role": "assistant", "content": "The capital of France is Paris.", "train_detail": detail}
    assert trained({"messages": [QUESTION, answer]}) == [" is Paris." + END]
    assert trained({"messages": [QUESTION, {**answer, "train": False}]}) == [" Paris."]
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": answer["content"], "train_detail": detail}]
    assert trained({"conversations": turns}) == [" is Paris." + END]


@pytest.mark.parametrize(
    ("begin", "end", "train", "runs"),
    [  # the tokens of the answer are Hello, ␣there and the end of the turn
        (0, 1, False, [" there" + END]),  # a part of Hello is left out, so that Hello is
        (0, 1, True, []),
        (4, 5, False, [END]),  # the edges of both
        (4, 5, True, []),
        (0, 4, False, [" there" + END]),  # where tokens end
        (0, 4, True, ["Hello"]),
        (5, 10, False, ["Hello", END]),
        (5, 10, True, [" there"]),
        (6, 10, False, ["Hello", END]),  # the space is no one's
        (6, 10, True, []),
    ],
)
@pytest.mark.parametrize("marked", [False, True])
def test_a_token_is_trained_only_if_all_its_characters_are(
    begin: int, end: int, train: bool, runs: list[str], marked: bool
) -> None:
    ids = chatml_tokenizer()("Hello there")["input_ids"]
    assert chatml_tokenizer().convert_ids_to_tokens(ids) == ["Hello", "Ġthere"]
    detail = [{"begin_offset": begin, "end_offset": end, "train": train}]
    answer = {"role": "assistant", "content": "Hello there", "train_detail": detail, "train": not train}
    after = [THANKS, WELCOME]  # so that something is trained at all
    row = {"messages": [QUESTION, answer, *after]}
    assert trained(row, marked=marked) == [*runs, "You are welcome 🙂" + END]
    num_cut = {(0, 4): 0, (5, 10): 0, (4, 5): 2}.get((begin, end), 1)
    report = run(row, marked=marked).report
    assert (report.flags_cut.count, report.tokens_cut, report.boundary_moved.count) == (num_cut > 0, num_cut, 0)
    said = f"1 rows (first: train[0]) have train flags whose edge lies within a token: {num_cut} tokens are left out"
    assert any(note.startswith(said) for note in report.notes()) is (num_cut > 0)
    found = [one for one in check([row], tokenizer=chatml_tokenizer(marked=marked)).findings if "0154" in one.code]
    assert [(one.severity, one.count, f"{num_cut} tokens are left" in one.sentence) for one in found] == [
        ("warning", 1, True)
    ] * (num_cut > 0)


def test_parts_of_an_answer_that_its_own_thought_holds_too() -> None:
    """What is flagged is the content, not the first place where its text stands."""
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.reasoning_content %}"
        "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    parts = [{"type": "text", "text": "Four", "train": False}, {"type": "text", "text": " it is."}]
    answer = {"role": "assistant", "content": parts, "reasoning_content": "Four it is."}
    row = {"messages": [QUESTION, answer]}
    assert trained(row, chat_template=template) == ["<think>Four it is.</think>", " it is." + END]


def test_sharegpt() -> None:
    turns = [
        {"from": "human", "value": "What is two plus two?"},
        {"from": "gpt", "value": "Four.", "train": False},
        {"from": "human", "value": "Thanks!"},
        {"from": "gpt", "value": "You are welcome 🙂", "weight": 1},
    ]
    assert trained({"conversations": turns}) == ["You are welcome 🙂" + END]


def test_calls_of_sharegpt_keep_their_flags() -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}', "train": False}
    turns = [
        {"from": "human", "value": "Add."},
        call,
        {"from": "observation", "value": "2"},
        {"from": "gpt", "value": "2."},
    ]
    assert trained({"conversations": turns}, chat_template="chatml") == ["2." + END]
    joined = [turns[0], {"from": "gpt", "value": "I add."}, *turns[1:]]
    with pytest.raises(DataError, match="is joined to the assistant's words before it") as caught:
        run({"conversations": joined}, chat_template="chatml")
    assert caught.value.code == "E-DATA-0042"


def test_templates_do_not_see_flags() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m | tojson }}<|im_end|>{% endfor %}"
    row = messages({"train": False}, {"weight": 1}, {"training": True}, {"train": False}, {"train": True})
    ((tokenized,),) = prepare([row], tokenizer, DataSettings()).samples
    text = tokenizer.decode(tokenized.branches[0].ids)
    assert not {word for word in ("train", "weight", "training") if word in text}


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ({"weight": 0.5}, r'"messages\[2\].weight" is 0.5'),
        ({"train": "yes"}, r'"messages\[2\].train" is text'),
        ({"train": True, "weight": 0}, "contradict each other"),
        ({"train_detail": {"train": True}}, r'"messages\[2\].train_detail" is an object, not a list'),
        ({"train_detail": ""}, r'"messages\[2\].train_detail" is text, not a list'),
        ({"train_detail": ["Four"]}, r'"messages\[2\].train_detail\[0\]" is text, no range of characters'),
        ({"train_detail": [{"end_offset": 1, "train": True}]}, r'train_detail\[0\].begin_offset" is missing'),
        ({"train_detail": [{"begin_offset": 1, "train": True}]}, r'train_detail\[0\].end_offset" is missing'),
        ({"train_detail": [{"begin_offset": "0", "end_offset": 1, "train": True}]}, r'begin_offset" is text, not a pl'),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1.5, "train": True}]}, r'end_offset" is 1.5, not a place'),
        ({"train_detail": [{"begin_offset": False, "end_offset": 1, "train": True}]}, r'begin_offset" is False, not a'),
        ({"train_detail": [{"begin_offset": -1, "end_offset": 1, "train": True}]}, r'begin_offset" is -1, not a place'),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1, "train": "no"}]}, r'train_detail\[0\].train" is text'),
        ({"train_detail": [[0, 2, True], [1, 3, True]]}, r'train_detail\[1\]" overlaps messages\[2\].train_detail\[0'),
        (
            {
                "train_detail": [
                    {"begin_offset": 2, "end_offset": 4, "train": True},
                    {"begin_offset": 0, "end_offset": 2, "train": False},
                ]
            },
            r'train_detail\[0\]" overlaps messages\[2\].train_detail\[1\] \(characters 2 to 2\)',
        ),
        ({"train_detail": [[0, 9, True]]}, r'train_detail\[0\]" ends at character 8, but the content has 5 characters'),
        ({"train_detail": [[0, 2, "x"]]}, r'train_detail\[0\]\[2\]" is text'),
        (
            {"content": [{"type": "text", "text": "Four.", "train": True}], "train_detail": [[0, 2, False]]},
            r'messages\[2\].content\[0\]" overlaps messages\[2\].train_detail\[0\]',
        ),
        ({"train_detail": [{"begin_offset": 3, "end_offset": 1, "train": True}]}, "is no range of characters"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 1}]}, "does not say whether to train"),
        ({"train_detail": [{"begin_offset": 0, "end_offset": 99, "train": True}]}, "ends at character 99, but the con"),
    ],
)
def test_what_is_no_flag_is_refused(flag: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says) as caught:
        run(messages({}, {}, flag, {}, {}))
    assert caught.value.code == "E-DATA-0042"


def test_ranges_of_a_call_of_sharegpt_are_refused() -> None:
    call = {"from": "function_call", "value": '{"name": "add", "arguments": {}}', "train_detail": [[0, 3, False]]}
    with pytest.raises(DataError, match=r"\"conversations\[1\].train_detail\[0\]\" ends at character 2, but") as caught:
        run({"conversations": [{"from": "human", "value": "Add."}, call]}, chat_template="chatml")
    assert caught.value.code == "E-DATA-0042"


def test_a_prompt_cannot_be_trained_where_only_completions_are() -> None:
    row = {"prompt": [QUESTION, {**ANSWER, "train": True}, THANKS], "completion": [WELCOME]}
    with pytest.raises(DataError, match=r'"prompt\[1\]" asks to be trained') as caught:
        run(row, assistant_only=False)
    assert caught.value.code == "E-DATA-0042"


def test_everything_left_out_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        run(messages({}, {}, {"train": False}, {}, {"train": False}))
    assert caught.value.code == "E-DATA-0022"


def test_a_role_that_the_template_leaves_out_is_refused() -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content }}<|im_end|>{% endfor %}"
    )
    row = {"messages": [{"role": "developer", "content": "Be\nbrief."}, QUESTION, ANSWER]}
    with pytest.raises(
        DataError, match=r'"messages\[0\]" is of role developer, which the chat template leaves'
    ) as caught:
        prepare([row], tokenizer, DataSettings())
    assert caught.value.code == "E-DATA-0043"


@pytest.mark.parametrize("how", ["m.content | tojson", "m.content | upper", "m.content | replace(' ', '_')"])
def test_a_message_written_otherwise_is_not_left_out(how: str) -> None:
    tokenizer = chatml_tokenizer()
    tokenizer.chat_template = f"{{% for m in messages %}}{{{{ {how} }}}}<|im_end|>{{% endfor %}}"
    row = {"messages": [{"role": "user", "content": 'Say "é\\"\tthen\n"ü"'}, ANSWER]}
    assert prepare([row], tokenizer, DataSettings()).report.used == 1


@pytest.mark.parametrize("role", ["Human", " user ", "prompter", "USER"])
def test_roles_are_found_however_they_are_spelt(role: str) -> None:
    row = {"messages": [{"role": role, "content": "Hi"}, {"role": "ChatGPT", "content": "Hello"}]}
    assert trained(row) == ["Hello" + END]


@pytest.mark.parametrize("flag", [False, None])
def test_a_range_goes_before_the_flag_of_its_turn(flag: bool | None) -> None:
    detail = [{"begin_offset": 0, "end_offset": 2, "train": True}]
    row = messages({}, {}, {"content": "You are welcome", "train": False, "train_detail": detail}, {}, {"train": flag})
    expected = ["You"] if flag is False else ["You", "You are welcome 🙂" + END]
    assert trained(row) == expected
    assert codes([row]) == []


def test_a_range_that_holds_no_whole_token_is_said_to_be_one() -> None:
    detail = [{"begin_offset": 1, "end_offset": 1, "train": True}]
    row = messages({}, {}, {"content": "You are welcome", "train": False, "train_detail": detail}, {}, {"train": False})
    with pytest.raises(
        DataError, match="what its train flags ask for is in each token beside what they leave"
    ) as caught:
        run(row)
    assert caught.value.code == "E-DATA-0022"
    assert "each with the space before it" in (caught.value.hint or "")


AGAIN = {"role": "user", "content": "Are you sure?"}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("completion_only", [None, True])
def test_what_others_say_in_a_completion_is_not_trained(marked: bool, completion_only: bool | None) -> None:
    row: dict[str, Any] = {"prompt": [QUESTION], "completion": [ANSWER, AGAIN, WELCOME]}
    settings = {"assistant_only": False, "completion_only": completion_only, "marked": marked}
    assert trained(row, **settings) == ["Four." + END, "You are welcome 🙂" + END]
    assert "Are you sure?" in "".join(trained(row, **{**settings, "completion_only": False}))
    row["completion"] = [ANSWER, {**AGAIN, "train": True}, WELCOME]
    assert trained(row, **settings) == ["Four." + END, "Are you sure?" + END, "You are welcome 🙂" + END]
    row["completion"] = [{"role": "tool", "content": "4"}, WELCOME]
    assert trained(row, **settings) == ["You are welcome 🙂" + END]


@pytest.mark.parametrize("completion", [[QUESTION], [QUESTION, {"role": "tool", "content": "4"}],
                                        [{**ANSWER, "train": False}]])  # fmt: skip
def test_a_completion_without_an_answer_is_refused_in_training_and_by_the_check(completion: list[Any]) -> None:
    row = {"prompt": [SYSTEM, QUESTION], "completion": completion}
    with pytest.raises(DataError, match='"completion" holds no turn of the assistant to train') as caught:
        run(row, assistant_only=False)
    assert caught.value.code == "E-DATA-0022"
    assert codes([row]) == ["E-DATA-0022"]


def test_pairs_compare_whole_answers() -> None:
    row = {"prompt": [QUESTION], "chosen": [ANSWER, AGAIN, WELCOME], "rejected": [WELCOME]}
    settings = DataSettings(method="preference", completion_only=True)
    ((pair,),) = prepare([row], chatml_tokenizer(), settings).samples
    chosen = pair.branches[0]
    assert "Are you sure?" in chatml_tokenizer().decode(chosen.ids[chosen.supervised])
    view = any_view(row, chatml_tokenizer())
    assert isinstance(view, PairView)
    assert view.chosen.counts["trained"] == chosen.supervised.sum()
    lengths = check([row], tokenizer=chatml_tokenizer()).lengths
    assert lengths.supervised == pair.num_supervised
