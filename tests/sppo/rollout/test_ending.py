"""Where responses end, arguments of the engine's own sampling, and progress within a rollout."""

import pytest
import torch
from older_transformers import skip_if_old
from tiny_models import char_tokenizer, tiny_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from sppo.rollout import HFRollout, ending, make_engine
from sppo.rollout.continuous import ContinuousRollout
from sppo.rollout.ending import Ending, StopAtStrings

PROMPTS = ["1+2=", "7", "12+34="]
STOPS = ["g", "7 3", "b c"]  # the tokenizer's decoder puts spaces between tokens


def byte_tokenizer():
    """Make a tokenizer of bytes and some longer tokens, in which a character may have several tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("S", "T"), ("ST", "O"), ("O", "P"), ("P", "S")]
    tokens = ["<eos>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<eos>")


@pytest.mark.parametrize("stops", [["STOP"], ["P", "TO"], ["é"], ["OPS", "é\n"], ["<eos>"]])
def test_a_response_ends_with_the_token_that_completes_a_stop_string(stops):
    tokenizer = byte_tokenizer()
    of_text = {token: i for token, i in tokenizer.get_vocab().items() if token in ("ST", "STO", "OP", "PS", "S", "T")}
    cases = [
        tokenizer("a STOPS and é\n STOP")["input_ids"],
        [of_text["ST"], of_text["OP"], of_text["S"]],
        [of_text["S"], of_text["T"], of_text["OP"], of_text["PS"]],
        tokenizer("nothing here")["input_ids"],
        [*tokenizer("in time")["input_ids"], 0, *tokenizer("STOP é\n")["input_ids"]],
    ]
    end = Ending({0}, tokenizer, stops)
    endings = set()
    for tokens in cases:
        texts = [tokenizer.decode(tokens[: i + 1]) for i in range(len(tokens))]
        by_stop = [i for i, text in enumerate(texts) if any(stop in text for stop in stops)]
        expected = min([*by_stop[:1], *(i for i, token in enumerate(tokens) if token == 0)], default=None)
        length = len(tokens) if expected is None else expected + 1
        assert end.cut(tokens) == (tokens[:length], expected is None)
        assert end.has_stop_string(tokens[:length][-end.window :]) == (by_stop[:1] == [length - 1])
        endings.add(expected is None)
    assert endings == {False, True}


def test_stop_strings_are_not_searched_in_prompts():
    tokenizer = char_tokenizer()
    ids = torch.tensor([tokenizer("2222" + "77777777")["input_ids"], tokenizer("1373" + "44444473")["input_ids"]])

    def ended(stop_string, width):
        return StopAtStrings(Ending({1}, tokenizer, [stop_string]), width)(ids, None).tolist()

    assert ended("7 3", width=4) == [False, True]
    assert ended("1 3", width=4) == [False, False]  # in a prompt
    assert ended("2 7", width=4) == [False, False]  # from a prompt into its response
    assert ended("7 7", width=5) == [False, False]  # no search after seven tokens


def engine(kind="hf", model=None, **settings):
    settings = {"max_completion_length": 24} | settings
    if kind == "continuous":
        skip_if_old()
        small = {"num_blocks": 24, "page_size": 16, "max_batch_tokens": 64}
        return ContinuousRollout(model or tiny_model(), char_tokenizer(), **small, **settings)
    return HFRollout(model or tiny_model(), char_tokenizer(), **settings)


KINDS = ["hf", pytest.param("continuous", marks=pytest.mark.slow)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("truncation", [{}, {"top_k": 5}])
def test_engines_stop_at_stop_strings(kind, truncation):
    """The responses are those without stop strings, cut; supports and log-probabilities are as long as they are."""
    temperature = 1.5 if kind == "hf" else 0.0  # continuous batching samples with the random numbers of all requests
    call = {"seed": 3, "temperature": temperature, "batch_size": 100}
    plain = engine(kind, **truncation).generate(PROMPTS * 8, **call)
    stops = STOPS if kind == "hf" else [plain[0].completion[4:11], plain[1].completion[2:5]]
    rollout = engine(kind, **truncation, stop_strings=stops)
    stopped = rollout.generate(PROMPTS * 8, **call)
    end, found = Ending(rollout.eos_ids, rollout.tokenizer, stops), 0
    for whole, sample in zip(plain, stopped, strict=True):
        assert (sample.response_ids, sample.truncated) == end.cut(whole.response_ids)
        assert sample.logprobs is None or len(sample.logprobs) == len(sample.response_ids)
        assert sample.support is None or len(sample.support[1]) == len(sample.response_ids) + 1
        if len(sample.response_ids) < len(whole.response_ids):
            found += 1
            assert any(sample.completion.endswith(stop) for stop in stops)  # the text keeps it
            assert not sample.truncated
    assert found > 1
    assert (stopped[0].support is None) == (not truncation or temperature == 0)


def test_a_batch_ends_when_all_rows_have_stopped():
    model, steps = tiny_model(), []
    model.register_forward_hook(lambda *_: steps.append(1))
    rollout = engine(model=model, stop_strings=list("0123456789abcdefghij+-=?"), max_completion_length=64)
    samples = rollout.generate(PROMPTS, seed=0, temperature=1.0, batch_size=3)
    assert len(steps) <= 8
    assert [s.truncated for s in samples] == [False] * 3


@pytest.mark.slow
def test_continuous_batching_finishes_stopped_requests(monkeypatch):
    given = []
    cut = Ending.cut
    monkeypatch.setattr(Ending, "cut", lambda self, tokens: given.append(list(tokens)) or cut(self, tokens))
    samples = engine("continuous", stop_strings=STOPS).generate(PROMPTS * 4, seed=0, temperature=1.0, batch_size=5)
    assert given == [s.response_ids for s in samples]  # nothing was sampled after a stop string
    assert any(not s.truncated and s.response_ids[-1] != 1 for s in samples)


def test_continuous_batching_with_other_internals_says_so(monkeypatch):
    from transformers.generation.continuous_batching.requests import RequestState

    monkeypatch.delattr(RequestState, "update_and_check_completion")
    with pytest.raises(RuntimeError, match=r"cannot stop at stop_strings with transformers .*use rollout_engine='hf'"):
        engine("continuous", stop_strings=STOPS).generate(PROMPTS, seed=0, temperature=1.0, batch_size=3)


@pytest.mark.parametrize("kind", KINDS)
def test_further_arguments_of_sampling_are_used(kind):
    digits = list(range(2, 12))
    samples = engine(kind, generation_kwargs={"suppress_tokens": digits}).generate(
        PROMPTS * 4, seed=0, temperature=1.0, batch_size=12
    )
    assert not {token for s in samples for token in s.response_ids} & set(digits)
    plain = engine(kind).generate(PROMPTS * 4, seed=0, temperature=1.0, batch_size=12)
    assert {token for s in plain for token in s.response_ids} & set(digits)


def test_unknown_arguments_of_sampling_are_named():
    with pytest.raises(ValueError, match=r"GenerationConfig has no 'repetition_penalti'; did you mean 'repetition_pen"):
        engine(generation_kwargs={"repetition_penalti": 2.0})
    with pytest.raises(ValueError, match="'repetition_penalty' does not work with rollout_engine='continuous', which"):
        make_engine(
            "continuous",
            tiny_model(),
            char_tokenizer(),
            {},
            max_completion_length=4,
            generation_kwargs={"repetition_penalty": 2.0},
        )


@pytest.mark.parametrize("stop_strings", [None, STOPS])
def test_progress_within_batches(monkeypatch, stop_strings):
    monkeypatch.setattr(ending, "_REPORT_INTERVAL", 0.0)
    rollout, reports = engine(stop_strings=stop_strings), []
    plain = rollout.generate(PROMPTS * 4, seed=1, temperature=2.0, batch_size=6)
    rollout.on_progress = lambda done, total: reports.append((done, total))
    assert rollout.generate(PROMPTS * 4, seed=1, temperature=2.0, batch_size=6) == plain
    done, totals = zip(*reports, strict=True)
    assert set(totals) == {12}
    assert list(done) == sorted(done)
    assert len({n for n in done if n < 6}) > 1  # within the first batch
    assert {6, 12} <= set(done)


def test_progress_is_reported_a_few_times_per_second(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(ending.time, "monotonic", lambda: now.append(now[-1] + 0.1) or now[-1])
    rollout, reports = engine(), []
    rollout.on_progress = lambda *numbers: reports.append(numbers)
    rollout.generate(PROMPTS, seed=0, temperature=1.0, batch_size=3)
    assert 3 <= len(reports) <= 7  # of 24 steps


@pytest.mark.slow
def test_continuous_batching_reports_progress():
    rollout, reports = engine("continuous"), []
    rollout.on_progress = lambda *numbers: reports.append(numbers)
    rollout.generate(PROMPTS, seed=0, temperature=1.0, batch_size=2)
    assert reports == [(1, 3), (2, 3), (3, 3)]
