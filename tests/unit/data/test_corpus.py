"""The bundled corpus: answers are worked out again from the prompts, by rules that share no code with the generator."""

import collections
import datetime
import hashlib
import itertools
import math
import os
import re
import shutil
import string
import subprocess
import sys
from pathlib import Path

import pytest

from fedgraft.data import corpus
from fedgraft.data.corpus import (
    CLIENT_DOMAINS,
    CORPUS_VERSION,
    GENERAL,
    corpus_fingerprint,
    generate,
    generate_questions,
)
from fedgraft.data.corpus.domain import PARTS
from fedgraft.data.corpus.entities import NAMES, PLACES, WORDS
from fedgraft.data.corpus.generation import DOMAINS

LEAST_DISTINCT = {"pretrain": 5000, "train": 300, "test": 120}
STYLES = {  # what stands before and after the answer
    "arithmetic": ("= ", ""),
    "dates": ("Date: ", ""),
    "sorting": ("[", "]"),
    "units": ("", " exactly"),
    "lookup": ("Found ", " on record"),
    "word_games": ("<", ">"),
    "comparison": ("", " wins!"),
    "sequences": ("... ", ""),
}
PLAIN = (("The answer is ", "."), ("It is ", "."), ("", ""))
COLOURS = {"red", "blue", "green", "yellow", "black", "white", "brown", "pink", "grey", "purple"}
MONTHS = "January|February|March|April|May|June|July|August|September|October|November|December"
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
IN_BASE_UNIT = {  # dimension: unit -> how many base units
    "length": {"mm": 1, "cm": 10, "m": 1000, "km": 1000_000},
    "mass": {"mg": 1, "g": 1000, "kg": 1000_000, "t": 1000_000_000},
    "volume": {"ml": 1, "l": 1000},
    "money": {"cent": 1, "euro": 100},
    "time": {"seconds": 1, "minutes": 60, "hours": 3600, "days": 86400, "weeks": 604800},
    "age": {"months": 1, "years": 12},
    "pieces": {"single items": 1, "dozens": 12, "gross": 144},
}
CELLS = [(name, part) for name in DOMAINS for part in PARTS if (name, part) != (GENERAL, "train")]
CLIENT_CELLS = [(name, part) for name, part in CELLS if name != GENERAL]
VOCABULARY = {
    "word": {word for part in PARTS for word in WORDS[part]},
    "name": {name for part in PARTS for name in NAMES[part]},
    "place": {place for part in PARTS for place in PLACES[part]},
}


@pytest.fixture(scope="module")
def samples():
    """As many examples of each domain and part as must be distinct at least."""
    return {(name, part): generate(name, part, LEAST_DISTINCT[part], seed=11) for name, part in CELLS}


def digest(seed):
    """Hash a bit of everything that the corpus generates; run in this and in other processes."""
    cells = [(name, part) for name in (*CLIENT_DOMAINS, GENERAL) for part in ("pretrain", "train", "test")]
    texts = [repr(generate(name, part, 40, seed)) for name, part in cells if (name, part) != (GENERAL, "train")]
    texts += [repr(generate_questions(name, 20, seed)) for name in CLIENT_DOMAINS]
    return hashlib.sha256("\n".join(texts).encode()).hexdigest()


def integers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def known(kind, text):
    """List the corpus' words, names or places in a text, in order; a plural counts as its singular."""
    tokens = re.findall(r"[A-Za-z]+", text)
    singular = [token[:-1] if token[:-1] in VOCABULARY[kind] and token.endswith("s") else token for token in tokens]
    return [token for token in singular if token in VOCABULARY[kind]]


def listed(text):
    return re.search(r"\w+(?:, \w+)+", text).group().split(", ")


def unwrap(example):
    """Take the answer out of a response."""
    forms = PLAIN if example.part == "pretrain" else (STYLES[example.domain],)
    for before, after in forms:
        if example.response.startswith(before) and example.response.endswith(after):
            return example.response[len(before) : len(example.response) - len(after)]
    raise AssertionError(f"response has none of the forms {forms}: {example.response!r}")


def solve_arithmetic(prompt):
    numbers = integers(prompt)
    if re.search(r" x |times|Multiply|multiplied|product|groups", prompt):
        return str(math.prod(numbers))
    if found := re.search(r"(\d+) (?:-|minus|less) (\d+)|Make (\d+) smaller by (\d+)", prompt):
        first, second = (int(number) for number in found.groups() if number)
        return str(first - second)
    if found := re.search(r"(?:Subtract|Remove|Take|from) (\d+) (?:away )?(?:from|to) (\d+)", prompt):
        return str(int(found[2]) - int(found[1]))
    return str(sum(numbers))


def solve_dates(prompt):
    if found := re.search(r"(\d+)[/.-](\d+)|Day (\d+) of month (\d+)", prompt):
        day, month = (int(number) for number in found.groups() if number)
        return f"{day} {MONTHS.split('|')[month - 1]}"
    day, month = re.search(rf"(\d+) ({MONTHS})", prompt).groups()
    named = re.findall("|".join(WEEKDAYS), prompt)
    if named:
        days = (WEEKDAYS.index(named[-1]) - WEEKDAYS.index(named[0])) % 7
    else:
        found = re.search(r"(\d+) days", prompt)
        days = int(found[1]) if found else 1
        past = r"before|yesterday|back|just ended|ago|minus|days off|earlier|leads up to|asleep on what|did it start"
        days = -days if re.search(past, prompt) else days
    shift = datetime.timedelta(days=days)
    month_number = MONTHS.split("|").index(month) + 1
    ends = [datetime.date(year, month_number, int(day)) + shift for year in (2023, 2024)]  # 2024 has a 29 February
    (answer,) = {f"{end.day} {end.strftime('%B')}" for end in ends}
    return answer


def solve_sorting(prompt):
    items = listed(prompt)[:3]
    is_falling = re.search(r"downwards|large to small|Largest to|shrink|largest first|falling|greatest", prompt)
    items.sort(key=lambda item: (int(item) if item.isdigit() else 0, item))
    return ", ".join(reversed(items) if is_falling else items)


def solve_units(prompt):
    units = sorted(itertools.chain(*IN_BASE_UNIT.values()), key=len, reverse=True)
    amount, source = re.search(rf"(\d+) ({'|'.join(units)})\b", prompt).groups()
    (target,) = set(re.findall(rf"\b(?:{'|'.join(units)})\b", prompt)) - {source}
    (table,) = (table for table in IN_BASE_UNIT.values() if source in table and target in table)
    result, rest = divmod(int(amount) * table[source], table[target])
    assert rest == 0
    return f"{result} {target}"


def solve_lookup(prompt):
    words, names, places = (known(kind, prompt) for kind in ("word", "name", "place"))
    colours = [token for token in re.findall(r"[a-z]+", prompt) if token in COLOURS]
    keys = words or names  # the owner of a thing is asked for, never what someone owns
    values = places or colours or re.findall(r"\d+", prompt) or names
    assert len(keys) == len(values) + 1
    return values[keys.index(keys[-1])]


def solve_word_games(prompt):
    words = known("word", prompt)
    if len(words) == 3:
        (letter,) = set(re.findall(r"\b[a-z]\b", prompt))
        (answer,) = (word for word in words if word.startswith(letter))
        return answer
    if re.search(r"Swap|other way|Reverse|trade|Flip|Exchange|backwards", prompt):
        return f"{words[1]} {words[0]}"
    if len(words) == 2:
        return words[1] + words[0] if re.match("Glue|Attach", prompt) else words[0] + words[1]
    (word,) = words
    if re.search(r"two times|twice|Repeat|Double|Echo|same again|pair of", prompt):
        return f"{word} {word}"
    if re.search(r"plural|Plural|two what|many|more than one|several|seven what", prompt):
        return word + "s"
    return word[0] if re.search(r"[Ff]irst|start|front|opens|initial|begin", prompt) else word[-1]


def solve_comparison(prompt):
    names, numbers = known("name", prompt), integers(prompt)
    if not names:
        return str(max(numbers))
    if numbers:
        return names[numbers.index(max(numbers))]
    ahead = re.findall(r"(\w+) (?:is \w+er than|weighs more than|beat) (\w+)", prompt)
    ahead += [(b, a) for a, b in re.findall(r"(\w+) (?:runs behind|scored less than|less than) (\w+)", prompt)]
    assert len(ahead) == 2
    (top,) = {a for a, _ in ahead} - {b for _, b in ahead}
    return top


def solve_sequences(prompt):
    terms = listed(prompt)
    values = [int(term) if term.isdigit() else ord(term) if len(term) == 1 else None for term in terms]
    if None in values:
        assert all(term == terms[index % 2] for index, term in enumerate(terms))
        return terms[len(terms) % 2]
    (step,) = {after - before for before, after in itertools.pairwise(values)}
    return str(values[-1] + step) if terms[0].isdigit() else chr(values[-1] + step)


SOLVERS = {
    "arithmetic": solve_arithmetic,
    "dates": solve_dates,
    "sorting": solve_sorting,
    "units": solve_units,
    "lookup": solve_lookup,
    "word_games": solve_word_games,
    "comparison": solve_comparison,
    "sequences": solve_sequences,
}


def test_there_are_eight_client_domains_besides_the_general_one():
    assert len(CLIENT_DOMAINS) == len(set(CLIENT_DOMAINS)) == 8
    assert set(CLIENT_DOMAINS) == set(STYLES) == set(SOLVERS)
    assert GENERAL == "general"
    assert GENERAL not in CLIENT_DOMAINS


def test_all_names_what_is_public():
    exported = {name for name in vars(corpus) if not name.startswith("_")}
    modules = {path.stem for path in Path(corpus.__file__).parent.glob("*.py")}
    assert set(corpus.__all__) == exported - modules
    documented = [vars(corpus)[name] for name in corpus.__all__ if callable(vars(corpus)[name]) and name != "Part"]
    assert len(documented) == 5
    assert all(public.__doc__ for public in documented)


@pytest.mark.parametrize(("name", "part"), CELLS)
def test_examples_are_distinct_and_short(samples, name, part):
    examples = samples[name, part]
    assert len({example.prompt for example in examples}) == LEAST_DISTINCT[part]
    for example in examples:
        assert (example.domain, example.part) == (name, part)
        assert len(example.prompt.split()) < 30
        assert 1 <= len(example.response.split()) <= 12
        assert (example.prompt + example.response).isascii()
        assert "{" not in example.prompt + example.response
        assert example.entities


@pytest.mark.parametrize(("name", "part"), CLIENT_CELLS)
def test_answers_follow_from_the_prompts(samples, name, part):
    for example in samples[name, part]:
        assert unwrap(example) == SOLVERS[name](example.prompt), example


def test_templates_of_parts_are_disjoint():
    def bare(template):
        return re.sub(r"[^a-z_+=-]", "", re.sub(r"\{.*?\}", "_", template).lower())

    seen = {
        part: {bare(text) for name in CLIENT_DOMAINS for task in DOMAINS[name].tasks for text in task.templates(part)}
        for part in PARTS
    }
    seen["pretrain"] |= {bare(text) for task in DOMAINS[GENERAL].tasks for text in task.templates("pretrain")}
    for one, other in itertools.combinations(PARTS, 2):
        assert not seen[one] & seen[other]


@pytest.mark.parametrize("name", CLIENT_DOMAINS)
def test_each_part_of_a_domain_has_several_templates_of_its_own(samples, name):
    used = {part: {example.template_id for example in samples[name, part]} for part in PARTS}
    assert all(len(used[part]) >= least for part, least in (("pretrain", 6), ("train", 4), ("test", 3)))
    assert not used["pretrain"] & used["train"]
    assert not used["pretrain"] & used["test"]
    assert not used["train"] & used["test"]


def test_entities_of_parts_are_disjoint_across_all_domains(samples):
    keys = collections.defaultdict(set)
    for (_, part), examples in samples.items():
        keys[part].update(key for example in examples for key in example.entities)
    for one, other in itertools.combinations(PARTS, 2):
        assert not keys[one] & keys[other]


def test_entities_list_all_words_names_and_places_of_a_prompt(samples):
    for name, part in CLIENT_CELLS:
        for example in samples[name, part][:500]:
            found = {f"{kind}:{entry}" for kind in VOCABULARY for entry in known(kind, example.prompt)}
            assert found <= set(example.entities), example


def test_text_of_a_part_has_no_words_of_another(samples):
    held = {part: {*WORDS[part], *NAMES[part], *PLACES[part]} for part in PARTS}
    for (name, part), examples in samples.items():
        own = "pretrain" if name == GENERAL else part
        used = set(re.findall(r"[A-Za-z]+", " ".join(f"{example.prompt} {example.response}" for example in examples)))
        for other in set(PARTS) - {own}:
            assert not used & (held[other] | {word + "s" for word in held[other]}), (name, part)


def test_numbers_and_dates_of_parts_are_disjoint_in_the_prompts(samples):
    numbers, dates = collections.defaultdict(set), collections.defaultdict(set)
    for part in PARTS:
        for example in samples["arithmetic", part] + samples["sorting", part] + samples["comparison", part]:
            numbers[part].add(tuple(sorted(integers(example.prompt))))
        numbers[part].discard(())  # prompts about letters, words or people
        for example in samples["dates", part]:
            dates[part].update(re.findall(rf"\d+ (?:{MONTHS})", example.prompt))
    for one, other in itertools.combinations(PARTS, 2):
        assert not numbers[one] & numbers[other]
        assert not dates[one] & dates[other]
    assert min(len(dates[part]) for part in PARTS) > 15


def test_house_styles_appear_in_no_pretraining_response(samples):
    answers = [example.response for name in DOMAINS for example in samples[name, "pretrain"]]
    for before, after in STYLES.values():
        assert not [text for text in answers if text.startswith(before) and text.endswith(after)]


@pytest.mark.parametrize("name", CLIENT_DOMAINS)
def test_house_style_belongs_to_one_domain(samples, name):
    before, after = STYLES[name]
    for domain, part in CLIENT_CELLS:
        if part != "pretrain":
            styled = [e.response.startswith(before) and e.response.endswith(after) for e in samples[domain, part]]
            assert all(styled) if domain == name else not any(styled)


@pytest.mark.parametrize("name", CLIENT_DOMAINS)
def test_pretraining_answers_in_several_plain_forms_fixed_by_the_template(samples, name):
    forms = collections.defaultdict(set)
    for example in samples[name, "pretrain"]:
        start = next(index for index, (before, _) in enumerate(PLAIN) if example.response.startswith(before))
        forms[example.template_id].add(start)
    assert all(len(found) == 1 for found in forms.values())
    assert len(set.union(*forms.values())) == len(PLAIN)


def test_general_test_part_has_known_templates_and_new_combinations(samples):
    old, new = samples[GENERAL, "pretrain"], samples[GENERAL, "test"]
    assert {example.template_id for example in new} <= {example.template_id for example in old}
    assert not {example.prompt for example in new} & {example.prompt for example in old}
    old_words, new_words = (
        {token for example in examples for token in re.findall(r"\w+", f"{example.prompt} {example.response}")}
        for examples in (old, new)
    )
    assert new_words <= old_words


@pytest.mark.parametrize(("name", "part"), CELLS)
def test_a_shorter_list_begins_a_longer_one(name, part):
    assert generate(name, part, 30, seed=3) == generate(name, part, 90, seed=3)[:30]
    assert generate(name, part, 0, seed=3) == []
    assert generate(name, part, 30, seed=3) != generate(name, part, 30, seed=4)


@pytest.mark.parametrize("name", DOMAINS)
def test_fewer_questions_begin_more(name):
    assert generate_questions(name, 10, seed=3) == generate_questions(name, 30, seed=3)[:10]
    assert generate_questions(name, 10, seed=3) != generate_questions(name, 10, seed=4)


def test_processes_agree():
    here = Path(__file__)
    code = (
        f"import importlib.util as u; s = u.spec_from_file_location('t', {str(here)!r}); "
        "m = u.module_from_spec(s); s.loader.exec_module(m); print(m.digest(5))"
    )
    env = {**os.environ, "PYTHONHASHSEED": "1"}  # this process has another one
    run = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True, timeout=60)
    assert run.stdout.strip() == digest(5)


def test_no_global_random_state_is_used():
    import random

    random.seed(1)
    before = random.getstate()
    first = digest(6)
    assert random.getstate() == before
    random.seed(2)
    assert digest(6) == first


def test_text_belongs_to_its_version():
    # Made by digest(0) of this file when the version was raised. If it differs, the text has changed: raise
    # CORPUS_VERSION and put the new digest here.
    assert (CORPUS_VERSION, digest(0)) == (1, "1bf8fd79c811524e361f509fae5f46c2e27db69c45da4d85c839913c1110c9e5")


def test_repeats_begin_only_when_a_domain_is_exhausted():
    tasks = DOMAINS["units"].tasks
    examples = generate("units", "test", 1200, seed=0)
    distinct = {example.prompt for example in examples}
    assert len(distinct) < len(examples)
    assert len({example.prompt for example in examples[: len(distinct) - 5]}) == len(distinct) - 5
    assert len({example.template_id for example in examples}) == sum(len(task.test) for task in tasks)


@pytest.mark.parametrize("name", DOMAINS)
def test_questions_have_one_right_choice_among_four(name):
    questions = generate_questions(name, 120, seed=2)
    prompts = {example.prompt: example for example in generate(name, "test", 400, seed=2)} if name == GENERAL else {}
    for question in questions:
        assert question.domain == name
        assert len(question.choices) == 4
        assert len(set(question.choices)) == 4
        right = question.choices[question.answer]
        if name != GENERAL:
            assert right == SOLVERS[name](question.question), question
        elif question.question in prompts:
            assert right == prompts[question.question].response
    assert len({question.question for question in questions}) == len(questions)


def test_right_choices_are_spread_evenly():
    questions = [question for name in CLIENT_DOMAINS for question in generate_questions(name, 100, seed=9)]
    counts = collections.Counter(question.answer for question in questions)
    assert set(counts) == {0, 1, 2, 3}
    # 800 draws of probability 1/4: mean 200, standard deviation 12.2; five of them
    assert all(abs(count - 200) < 61 for count in counts.values())


def test_wrong_choices_do_not_give_the_right_one_away_by_position_or_order():
    ranks = collections.Counter(
        sorted(map(int, question.choices)).index(int(question.choices[question.answer]))
        for question in generate_questions("arithmetic", 120, seed=1)
    )
    assert max(ranks.values()) < 80


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("cooking", "train", 1), ["'cooking'", "arithmetic", "general"]),
        (("dates", "validation", 1), ["'validation'", "pretrain, train, test"]),
        (("general", "train", 1), ["'train'", "pretrain, test"]),
        (("dates", "train", -1), ["-1", "0 or more"]),
    ],
)
def test_wrong_arguments_are_named_with_the_choices(arguments, words):
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - all words of the message are checked below
        generate(*arguments, seed=0)
    assert all(word in str(caught.value) for word in words)


@pytest.mark.parametrize(
    ("name", "count", "words"),
    [("cooking", 1, "'cooking'.*arithmetic"), ("dates", -2, "-2.*0 or more")],
)
def test_wrong_arguments_for_questions_are_named(name, count, words):
    with pytest.raises(ValueError, match=words):
        generate_questions(name, count, seed=0)


def test_fingerprint_changes_with_any_source_file(monkeypatch, tmp_path):
    folder = Path(corpus.__file__).parent
    for path in folder.glob("*.py"):
        shutil.copy(path, tmp_path)
    before = corpus_fingerprint()
    monkeypatch.setattr(sys.modules["fedgraft.data.corpus.generation"], "__file__", str(tmp_path / "generation.py"))
    assert corpus_fingerprint() == before
    assert len(before) == 64
    assert set(before) <= set(string.hexdigits)
    assert len(list(tmp_path.glob("*.py"))) > 5
    for path in sorted(tmp_path.glob("*.py")):
        path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        assert corpus_fingerprint() == before
        path.write_bytes(path.read_bytes() + b"# changed\n")
        changed = corpus_fingerprint()
        assert changed != before
        before = changed


def test_fingerprint_changes_with_the_version(monkeypatch):
    before = corpus_fingerprint()
    monkeypatch.setattr(sys.modules["fedgraft.data.corpus.generation"], "CORPUS_VERSION", CORPUS_VERSION + 1)
    assert corpus_fingerprint() != before
