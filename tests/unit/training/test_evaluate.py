"""Scores and greedy answers against closed forms, HF's own loss, and unbatched decoding without a cache."""

from __future__ import annotations

import logging
import math
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, Qwen2MoeConfig, Qwen2MoeForCausalLM

from fedgraft.errors import DataError, ModelError
from fedgraft.training.decode import decode_greedy, rouge_l
from fedgraft.training.evaluate import ChoiceTokens, is_informative, score_batches, score_choices
from fedgraft.types import IGNORE_INDEX, Batch, Weighted

X = IGNORE_INDEX
EOS, PAD = 7, 0


class Bigram(torch.nn.Module):
    """The logits after token a are row a of a table, whatever came before; counts its calls."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.widths: list[tuple[int, ...]] = []

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        assert not self.training
        self.widths.append(tuple(input_ids.shape))
        return SimpleNamespace(logits=self.get_buffer("table")[input_ids], past_key_values=None)


def chain(successors: dict[int, int], num_tokens: int = 8) -> Bigram:
    """Make a bigram that is sure of one next token."""
    table = torch.zeros(num_tokens, num_tokens)
    for token, successor in successors.items():
        table[token, successor] = 10.0
    return Bigram(table)


def batch_of(rows: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Batch:
    """Tokens and labels of each row, padded on the right."""
    width = max(len(tokens) for tokens, _ in rows)
    ids, mask = torch.full((len(rows), width), PAD), torch.zeros((len(rows), width), dtype=torch.int64)
    labels = torch.full((len(rows), width), X)
    for row, (tokens, wanted) in enumerate(rows):
        ids[row, : len(tokens)], mask[row, : len(tokens)] = torch.tensor(tokens), 1
        labels[row, : len(wanted)] = torch.tensor(wanted)
    return Batch(input_ids=ids, attention_mask=mask, labels=labels)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small are not faster on more threads, and far slower where other processes want the cores too."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> Qwen2MoeForCausalLM:
    config = Qwen2MoeConfig(
        vocab_size=40,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=4,
        num_experts_per_tok=2,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(3)
    made = Qwen2MoeForCausalLM(config).eval()
    made.set_experts_implementation("eager")
    return made


def random_tokens(lengths: Sequence[int], seed: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(8, 40, (length,), generator=generator).tolist() for length in lengths]


def response_rows(lengths: Sequence[tuple[int, int]], seed: int) -> list[tuple[list[int], list[int]]]:
    """Random rows of a prompt and a response, the labels on the response."""
    tokens = random_tokens([prompt + response for prompt, response in lengths], seed)
    return [(row, [X] * prompt + row[prompt:]) for row, (prompt, _) in zip(tokens, lengths, strict=True)]


# ---- score_batches


def test_uniform_logits_cost_log_v_a_token() -> None:
    batches = [
        batch_of([([1, 2, 3, 0], [X, X, 3, 0]), ([4, 5], [X, 5])]),
        batch_of([([6, 1, 1], [X, 1, 1])]),
    ]
    scores = score_batches(Bigram(torch.zeros(8, 8)), batches)
    assert set(scores) == {"nll", "token_accuracy"}
    assert scores["nll"].weight == 5
    assert scores["nll"].mean == pytest.approx(math.log(8), rel=1e-6)
    assert scores["token_accuracy"] == Weighted(total=1, weight=5)  # all tie, so the first choice is token 0


def test_labels_are_shifted_and_the_first_is_not_counted() -> None:
    table = torch.tensor([[0.5, 0.25, 0.25], [0.125, 0.125, 0.75], [0.2, 0.3, 0.5]]).log()
    # 0 -> 1 costs log 4 (missed), 1 -> 2 costs -log 0.75 (hit), 2 -> 0 costs log 5 (missed); column 0 is free
    batch = batch_of([([0, 1, 2, 0, 1], [0, 1, 2, 0, X])])
    scores = score_batches(Bigram(table), [batch])
    assert scores["nll"].total == pytest.approx(math.log(4) - math.log(0.75) + math.log(5), rel=1e-6)
    assert scores["token_accuracy"] == Weighted(total=1, weight=3)


def test_score_equals_the_models_own_loss(model: Qwen2MoeForCausalLM) -> None:
    batches = [batch_of(response_rows([(3, 6), (5, 4), (2, 7)], seed)) for seed in (1, 2)]
    scores = score_batches(model, batches)
    nll, hits, count = 0.0, 0, 0
    with torch.no_grad():
        for batch in batches:
            output = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask, labels=batch.labels)
            nll += output.loss.item() * batch.num_label_tokens
            hits += int((output.logits.argmax(-1)[:, :-1] == batch.labels[:, 1:]).sum())
            count += batch.num_label_tokens
    assert count == 34
    assert scores["nll"].total == pytest.approx(nll, rel=1e-5)
    assert scores["token_accuracy"] == Weighted(total=hits, weight=count)


def test_a_padded_batch_scores_like_its_rows_alone(model: Qwen2MoeForCausalLM) -> None:
    rows = response_rows([(3, 2), (9, 5), (1, 12), (6, 1)], seed=5)
    together = score_batches(model, [batch_of(rows)])
    alone = score_batches(model, [batch_of([row]) for row in rows])
    assert together["nll"].weight == alone["nll"].weight == 20
    assert together["nll"].total == pytest.approx(alone["nll"].total, abs=1e-5)
    assert together["token_accuracy"] == alone["token_accuracy"]


def test_sums_run_in_float64() -> None:
    table = torch.tensor([[0.0, 2.0**24], [0.0, 0.0]])
    scores = score_batches(Bigram(table), [batch_of([([0, 0, 1, 1, 1], [X, 0, X, 1, 1])])])
    assert scores["nll"].total == pytest.approx(2.0**24 + 2 * math.log(2), abs=1e-6)  # float32 has steps of 2 here


def test_nothing_to_score_is_zero_over_zero() -> None:
    nothing = batch_of([([1, 2], [1, X])])
    for batches in ([], [nothing]):
        scores = score_batches(Bigram(torch.zeros(8, 8)), batches)
        assert scores["nll"] == scores["token_accuracy"] == Weighted(total=0, weight=0)


def test_modules_get_their_modes_back_and_can_be_trained(model: Qwen2MoeForCausalLM) -> None:
    model.train()
    model.lm_head.eval()
    before = [module.training for module in model.modules()]

    def lazily() -> Iterator[Batch]:
        assert not model.training
        yield (made := batch_of(response_rows([(2, 3)], seed=1)))
        assert not made.input_ids.is_inference()
        assert not torch.ones(1).is_inference()

    score_batches(model, lazily())
    decode_greedy(model, [[9, 8]], max_new_tokens=2, eos_token_id=EOS, pad_token_id=PAD, batch_size=1)
    assert [module.training for module in model.modules()] == before
    with pytest.raises(ZeroDivisionError):
        score_batches(model, (batch_of([([1 // 0], [])]) for _ in range(1)))
    assert [module.training for module in model.modules()] == before
    batch = batch_of(response_rows([(2, 3)], seed=1))
    model(input_ids=batch.input_ids, labels=batch.labels).loss.backward()
    model.zero_grad(set_to_none=True)
    model.eval()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_refused_with_their_place(value: float) -> None:
    table = torch.zeros(8, 8)
    table[5, 3] = value
    fine, broken = batch_of([([5, 1, 2], [X, X, 2])]), batch_of([([1, 2], [X, 2]), ([1, 5, 1], [X, X, 1])])
    assert score_batches(Bigram(table), [fine])["nll"].weight == 1  # 5 predicts a prompt token, which is not scored
    with pytest.raises(ModelError, match=r"for batch 1 row 1\n"):
        score_batches(Bigram(table), [fine, broken])
    questions = [ChoiceTokens(prompt=(1,), choices=((1,), (2, 3), (5, 1)), answer=0) for _ in range(6)]
    with pytest.raises(ModelError, match=r"question 0 choice 2, question 1 choice 2, question 2 choice 2 and 3 more"):
        score_choices(Bigram(table), questions, pad_token_id=PAD, batch_size=18)
    with pytest.raises(ModelError, match=r"for prompt 1\n"):
        decode_greedy(Bigram(table), [[1], [5]], max_new_tokens=3, eos_token_id=EOS, pad_token_id=PAD, batch_size=3)


# ---- decode_greedy


def decode_plainly(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """One prompt, no padding, no cache, no end."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(max_new_tokens):
            tokens.append(int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_batched_decoding_equals_one_prompt_at_a_time(model: Qwen2MoeForCausalLM) -> None:
    prompts = random_tokens([3, 17, 1, 9, 9, 24, 2, 12, 5, 30, 7], seed=11)
    plain = [decode_plainly(model, prompt, 16) for prompt in prompts]
    eos = plain[1][6]
    expected = [row[: row.index(eos)] if eos in row else row for row in plain]
    assert len({len(row) for row in expected}) >= 3, "the case shows little: answers end at the same token"
    assert len({tuple(row) for row in plain}) == len(plain)
    for batch_size, pad_token_id in ((4, PAD), (11, eos)):
        decoded = decode_greedy(
            model,
            prompts,
            max_new_tokens=16,
            eos_token_id=eos,
            pad_token_id=pad_token_id,
            batch_size=batch_size,
        )
        assert decoded == expected


def test_positions_count_from_the_first_token_of_each_prompt() -> None:
    """Rotary embeddings only know distances; learned positions show where a padded prompt begins."""
    config = GPT2Config(
        vocab_size=40,
        n_positions=40,
        n_embd=32,
        n_layer=2,
        n_head=4,
        initializer_range=0.5,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(4)
    learned = GPT2LMHeadModel(config).eval()
    prompts = random_tokens([3, 17, 1, 9], seed=12)
    expected = [decode_plainly(learned, prompt, 10) for prompt in prompts]
    assert (
        decode_greedy(
            learned,
            prompts,
            max_new_tokens=10,
            eos_token_id=-1,
            pad_token_id=PAD,
            batch_size=4,
        )
        == expected
    )


def test_decoding_equals_generate(model: Qwen2MoeForCausalLM) -> None:
    prompt = random_tokens([10], seed=2)[0]
    expected = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, 10, dtype=torch.int64),
        do_sample=False,
        max_new_tokens=12,
        pad_token_id=PAD,
    )[0, 10:].tolist()
    decoded = decode_greedy(model, [prompt], max_new_tokens=12, eos_token_id=-1, pad_token_id=PAD, batch_size=2)
    assert decoded == [expected]


def test_answers_stop_at_the_end_token_and_keep_the_order_given() -> None:
    stub = chain({1: 2, 2: 3, 3: EOS, 4: 4, EOS: 5, 5: 5})
    prompts = [[1], [6, 6, 3], [4, 4, 4, 2], [6, 1]]
    arguments = {"eos_token_id": EOS, "pad_token_id": PAD, "batch_size": 2}
    assert decode_greedy(stub, prompts, max_new_tokens=9, **arguments) == [[2, 3], [], [3], [2, 3]]
    # By length: rows 2 and 1 in 2 steps, rows 3 and 0 in 3; one token a step after the prompt, none after the last end.
    assert stub.widths == [(2, 4), (2, 1), (2, 2), (2, 1), (2, 1)]
    assert decode_greedy(stub, [[4], [1]], max_new_tokens=3, **arguments) == [[4, 4, 4], [2, 3]]
    assert decode_greedy(stub, [[4], [1]], max_new_tokens=0, **arguments) == [[], []]
    assert decode_greedy(stub, [], max_new_tokens=3, **arguments) == []


def test_what_follows_an_end_token_is_not_judged() -> None:
    stub = chain({1: EOS, 2: 3, 3: 4, 4: EOS})
    stub.get_buffer("table")[EOS] = math.nan  # the row that ended first goes on to here
    decoded = decode_greedy(stub, [[1], [2]], max_new_tokens=5, eos_token_id=EOS, pad_token_id=PAD, batch_size=2)
    assert decoded == [[], [3, 4]]


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(DataError, match=r"prompt 1$"):
        decode_greedy(chain({}), [[1], []], max_new_tokens=1, eos_token_id=EOS, pad_token_id=PAD, batch_size=2)


# ---- rouge_l


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("the cat the mat", "the cat sat on the mat", 0.8),  # LCS 4, precision 1, recall 4/6
        ("sat cat the", "the cat sat", 1 / 3),  # order counts: LCS 1 of 3 and 3
        ("a b\nc d", "c d\na b", 0.5),  # lines are not matched one by one
        ("He was running!", "he was runs", 1.0),  # case, punctuation and endings do not count
        ("the answer = 42", "the answer = 43", 2 / 3),
        ("= 42", "= 43", 0.0),
        ("42", "= 42.", 1.0),
        ("420", "42", 0.0),
        ("-42", "42", 1.0),
        ("3.5", "3, 5", 1.0),
        ("3.5", "3.6", 0.5),
        ("\u00e4", "\u00e4", 0.0),
        ("", "42", 0.0),
        ("", "", 0.0),
    ],
)
def test_rouge_l_by_hand(prediction: str, reference: str, expected: float) -> None:
    assert rouge_l([prediction], [reference]).total == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow  # a process that imports what a replica does
def test_only_who_scores_a_text_pays_for_what_scores_it() -> None:
    code = (
        "import sys\nimport fedgraft.platform.worker\nfrom fedgraft.training.decode import rouge_l\n"
        "early = {'nltk', 'sklearn'} & set(sys.modules)\nrouge_l(['a'], ['a'])\n"
        "sys.exit(','.join(sorted(early)) or ('nltk' not in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_rouge_l_sums_over_texts_and_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        total = rouge_l(["the cat the mat", "= 42", "a b"], ["the cat sat on the mat", "= 43", "a b"])
    assert total.total == pytest.approx(1.8, abs=1e-12)
    assert total.weight == 3
    assert not caplog.records
    assert rouge_l([], []) == Weighted(total=0, weight=0)
    with pytest.raises(ValueError, match="zip"):
        rouge_l(["a"], [])


# ---- score_choices


def test_choices_are_compared_by_their_mean_over_tokens() -> None:
    # After 0: token 1 with 0.3, token 2 with 0.5; after 2: token 3 with 0.5. So (1,) is likelier as a whole than
    # (2, 3), 0.3 against 0.25, and less likely a token, 0.3 against 0.5.
    table = torch.tensor([[0.1, 0.3, 0.5, 0.1], [0.25] * 4, [0.2, 0.1, 0.2, 0.5], [0.25] * 4]).log()
    choices = ((1,), (2, 3), (3,))
    questions = [ChoiceTokens(prompt=prompt, choices=choices, answer=1) for prompt in ((0,), (3, 3, 0), (1, 0))]
    questions.append(ChoiceTokens(prompt=(2, 0), choices=choices, answer=0))
    for batch_size in (1, 4, 50):
        got = score_choices(Bigram(table), questions, pad_token_id=3, batch_size=batch_size)
        assert got == Weighted(total=3, weight=4)


def test_of_equal_choices_the_first_is_taken() -> None:
    choices = ((1, 2, 3), (4,), (5, 6), (7, 1))
    questions = [ChoiceTokens(prompt=(1, 2), choices=choices, answer=answer) for answer in (0, 1, 2, 3, 0)]
    got = score_choices(Bigram(torch.zeros(8, 8)), questions, pad_token_id=PAD, batch_size=3)
    assert got == Weighted(total=2, weight=5)
    assert score_choices(Bigram(torch.zeros(8, 8)), [], pad_token_id=PAD, batch_size=3) == Weighted(total=0, weight=0)


def test_choices_of_a_real_model_equal_one_at_a_time(model: Qwen2MoeForCausalLM) -> None:
    best = []
    prompts = random_tokens([4, 11, 1, 7, 19], seed=21)
    answers = [random_tokens([1, 5, 2, 3], seed=30 + idx) for idx in range(5)]
    with torch.no_grad():
        for prompt, choices in zip(prompts, answers, strict=True):
            means = []
            for choice in choices:
                log_probs = model(input_ids=torch.tensor([prompt + choice])).logits[0].double().log_softmax(-1)
                means.append(sum(log_probs[len(prompt) + i - 1, token].item() for i, token in enumerate(choice)))
                means[-1] /= len(choice)
            best.append(means.index(max(means)))
    assert len(set(best)) > 1
    for shift, expected in ((0, 5), (1, 0)):
        questions = [
            ChoiceTokens(prompt=tuple(prompt), choices=tuple(map(tuple, choices)), answer=(right + shift) % 4)
            for prompt, choices, right in zip(prompts, answers, best, strict=True)
        ]
        got = score_choices(model, questions, pad_token_id=PAD, batch_size=6)
        assert got == Weighted(total=expected, weight=5)


@pytest.mark.parametrize(
    ("prompt", "choices", "answer"),
    [((), ((1,),), 0), ((1,), ((1,), ()), 0), ((1,), ((1,), (2,)), 2), ((1,), ((1,),), -1), ((1,), (), 0)],
)
def test_a_question_without_tokens_or_answer_is_refused(prompt: Any, choices: Any, answer: int) -> None:
    with pytest.raises(DataError, match="multiple-choice question"):
        ChoiceTokens(prompt=prompt, choices=choices, answer=answer)


# ---- is_informative


@pytest.mark.parametrize(
    ("right", "questions", "num_choices", "expected"),
    [
        (33, 100, 4, False),  # 0.25 +- 2 * 0.0433 is 0.1634 to 0.3366
        (34, 100, 4, True),
        (17, 100, 4, False),
        (16, 100, 4, True),
        (1, 1, 2, False),
        (0, 3, 4, False),
        (60, 100, 2, False),  # two standard errors exactly
        (61, 100, 2, True),
        (0, 0, 4, False),
        (5, 5, 1, False),
    ],
)
def test_an_accuracy_informs_beyond_two_standard_errors(
    right: int,
    questions: int,
    num_choices: int,
    expected: bool,
) -> None:
    assert is_informative(Weighted(total=right, weight=questions), num_choices) is expected
