"""The way in through transformers: everything `model.generate` takes, honoured or refused.

`LookaheadDecoding` is a decoding loop that `generate(custom_generate=...)` calls after its own preparations, and
`generate` is the same in one call, with the arguments that `generate` keeps from such a loop.
"""

from __future__ import annotations

import copy
import operator
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from transformers import (
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerateDecoderOnlyOutput
from transformers.generation.logits_process import (
    EncoderNoRepeatNGramLogitsProcessor,
    EncoderRepetitionPenaltyLogitsProcessor,
    PrefixConstrainedLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
)
from transformers.generation.streamers import BaseStreamer
from transformers.generation.utils import MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL

from ..config import EXECUTIONS, LookaheadConfig
from ..draft.lookahead import Choice, max_rows
from ..draft.shared import Namespace
from ..draft.sources import Propose
from ..engine.decode import Request, decode
from ..model.evaluate import CACHE_NAMES, cache_in, cache_name, text_config, unwrapped
from ..model.memory import memory_of
from ..model.probe import probe
from ..model.rope import switch_of
from ..model.target import Target
from ..price.stats import Stats
from ..ranks.following import refuse_what_cannot_follow, state_of
from ..ranks.group import Ranks
from ..ranks.sharded import ShardedTarget
from ..verify.sampler import Sampler

# What we do with each field of GenerationConfig. "honoured": exactly as `generate` does. "engine": it chooses how
# plain decoding runs, not what it says; ours replaces a default of the model's files, and what a caller asks for is
# refused. Otherwise the text says what a caller should do instead: a value that would change the output is refused.
_BEAMS = "beam search is not supported: set num_beams=1, or use model.generate without lookahead"
_ASSISTED = "another assisted method cannot run inside lookahead decoding: leave it out, or use model.generate"
_ENGINE = "engine"
_HONOURED = "honoured"
_IRRELEVANT = "irrelevant"

GENERATION_CONFIG_FIELDS: dict[str, str] = {
    **dict.fromkeys(
        """max_length max_new_tokens min_length min_new_tokens max_time stop_strings do_sample temperature top_k top_p
        min_p top_h typical_p epsilon_cutoff eta_cutoff repetition_penalty encoder_repetition_penalty
        no_repeat_ngram_size bad_words_ids renormalize_logits forced_bos_token_id forced_eos_token_id
        remove_invalid_values exponential_decay_length_penalty suppress_tokens begin_suppress_tokens sequence_bias
        watermarking_config num_return_sequences output_scores output_logits return_dict_in_generate pad_token_id
        bos_token_id eos_token_id encoder_no_repeat_ngram_size""".split(),
        _HONOURED,
    ),
    # these act in modes that are refused by another field, or say nothing about decoding
    **dict.fromkeys(
        """early_stopping length_penalty decoder_start_token_id is_assistant num_assistant_tokens
        num_assistant_tokens_schedule assistant_confidence_threshold max_matching_ngram_size assistant_lookbehind
        target_lookbehind assistant_ensemble_weight transformers_version low_memory continuous_batching_config
        speculation_type num_assistant_steps trust_remote_code fast_forward""".split(),
        _IRRELEVANT,
    ),
    **dict.fromkeys(
        """use_cache cache_implementation cache_config max_cache_len compile_config disable_compile
        prefill_chunk_size""".split(),
        _ENGINE,
    ),
    **dict.fromkeys("num_beams num_beam_groups diversity_penalty constraints force_words_ids".split(), _BEAMS),
    **dict.fromkeys("prompt_lookup_num_tokens assistant_early_exit use_mtp".split(), _ASSISTED),
    "penalty_alpha": "contrastive search is not supported: leave penalty_alpha out",
    "dola_layers": "DoLa is not supported: leave dola_layers out",
    "guidance_scale": "guidance runs a second forward per token and is not supported: leave guidance_scale out",
    "token_healing": "token healing is not supported: heal the prompt with model.heal_tokens first",
    "output_attentions": "attentions of a step are those of a tree: leave output_attentions out",
    "output_hidden_states": "hidden states of a step are those of a tree: leave output_hidden_states out",
}
# The values with which a refused field says nothing.
_SILENT = {"num_beams": (None, 1), "num_beam_groups": (None, 1), "guidance_scale": (None, 1, 1.0)}
_SILENT |= {"diversity_penalty": (None, 0.0), "penalty_alpha": (None, 0.0), "use_cache": (None, True)}

GENERATE_PARAMETERS: dict[str, str] = {
    **dict.fromkeys(
        """inputs generation_config logits_processor stopping_criteria prefix_allowed_tokens_fn streamer tokenizer
        kwargs""".split(),
        _HONOURED,
    ),
    "assistant_model": _ASSISTED,
    "synced_gpus": "synchronised ranks are not supported: leave synced_gpus out",
    "custom_generate": "lookahead decoding is a custom_generate itself: pass only one",
    "negative_prompt_ids": "guidance is not supported: leave negative_prompt_ids out",
    "negative_prompt_attention_mask": "guidance is not supported: leave negative_prompt_attention_mask out",
}
# What the loop takes of a model's own inputs.
_MODEL_INPUTS = frozenset({"attention_mask", "position_ids", *CACHE_NAMES, "use_cache", "logits_to_keep"})
# What belongs to the prompt alone: images, sounds and where they stand.
_PROMPT_INPUTS = frozenset(MULTIMODAL_INPUTS_TO_DROP_OUTSIDE_PREFILL) | {
    *"image_position_ids video_position_ids num_frames_per_video batch_num_images vision_aspect_ratio".split(),
    *"vision_feature_layer vision_feature_select_strategy spatial_shapes image_merge_sizes video_merge_sizes".split(),
    *"image_num_crops image_grid_hw target_sizes target_sizes_videos interpolate_pos_encoding".split(),
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
}


def _shared(shared: Any, config: LookaheadConfig) -> Namespace | None:
    if shared is None:
        if config.sources == ("shared",):
            raise ValueError(
                "source 'shared' alone needs a shared pool: pass shared=SharedPool().namespace(name), or --shared-pool"
            )
        return None
    if not isinstance(shared, Namespace):
        raise TypeError(f"shared must be a namespace, SharedPool().namespace(name), got {type(shared).__name__}")
    if "shared" not in config.sources:
        raise ValueError("a shared pool was given, and the sources leave out 'shared', as the paper's and plain do")
    return shared


def check_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer, if it is one.

    Raises:
        TypeError: it is none.
    """
    if not (callable(tokenizer) and hasattr(tokenizer, "decode")):
        raise TypeError(f"tokenizer must be a tokenizer, as AutoTokenizer gives, got {type(tokenizer).__name__}")
    return tokenizer


def check_ids(model: PreTrainedModel, ids: Any, images: bool = False) -> None:
    """See that token ids are a tensor of them, in the model's vocabulary.

    Args:
        images: whether some stand for images, whose numbers may lie outside of it.

    Raises:
        TypeError, ValueError: they are not; the message says what was given, and what to do.
    """
    if not isinstance(ids, torch.Tensor):
        given = type(ids).__name__
        what = "a tokenizer's result goes in as **inputs" if isinstance(ids, Mapping) else "text needs a tokenizer"
        raise TypeError(f"input_ids must be a tensor of token ids, (batch, length), got {given}: {what}")
    if ids.ndim != 2:
        raise ValueError(f"input_ids must be (batch, length), got shape {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise TypeError(f"input_ids must be integers, got {ids.dtype}")
    size = getattr(model.get_input_embeddings(), "num_embeddings", None)
    if size is None or images or not ids.numel():
        return
    low, high = (int(bound) for bound in ids.aminmax())
    if low < 0 or high >= size:
        raise ValueError(f"input_ids has token {low if low < 0 else high}, and the model's go from 0 to {size - 1}")


def _texts(stops: Any) -> list[str]:
    """Stop strings as a list."""
    found = [stops] if isinstance(stops, str) or not isinstance(stops, Sequence) else list(stops)
    if stops is not None and not all(isinstance(stop, str) and stop for stop in found):
        raise TypeError(f"stop_strings must be a text or several, none of them empty, got {stops!r}")
    return [] if stops is None else found


def _seeds(seeds: Any) -> list[int] | None:
    if seeds is None:
        return None
    try:
        given = list(seeds)
    except TypeError:
        raise TypeError(f"seeds must be integers, one per sequence, got {seeds!r}") from None
    return [_seed(seed, "seeds must be integers, one per sequence") for seed in given]


def _seed(seed: Any, wanted: str) -> int:
    """A seed as torch takes it."""
    try:
        number = -1 if isinstance(seed, bool) else operator.index(seed)
    except TypeError:
        number = -1
    if not 0 <= number < 2**63:
        kind = ValueError if type(seed) is int else TypeError
        raise kind(f"{wanted} from 0 to 2**63 - 1, got {seed!r}")
    return number


def _has_images(inputs: Mapping[str, Any]) -> bool:
    """Whether a prompt has more than text in it, whose places have ids that may lie outside of the vocabulary."""
    return any(_says(inputs.get(name)) for name in _PROMPT_INPUTS if not name.endswith("token_type_ids"))


def _says(value: Any) -> bool:
    """Whether an input of the prompt is more than an empty one, which `generate` makes where there are no images."""
    return any(v is not None for v in value.values()) if isinstance(value, Mapping) else value is not None


class LookaheadDecoding:
    """Lookahead decoding as a `custom_generate` of transformers.

    `generate` hands a custom loop neither its streamer nor its tokenizer and says nothing of it, so give them here: a
    streamer beside `custom_generate=` gets no token.

    Args:
        config: the sources, and what is fixed; the defaults if left out.
        streamer: gets the prompt once, every token once, and the end. For one sequence.
        tokenizer: needed for stop strings.
        stop_strings: texts that end a sequence.
        seeds: one per sequence, for sampling; each sequence then draws from a generator of its own. With
            several sequences and no seeds they are drawn from torch's generator; with one, torch's is used itself.
        seed: the first sequence's, from which the others' are counted up, in place of `seeds`.
        propose: a further source of candidates: the text so far (token ids, prompt included) to draft tokens.
        shared: a namespace of a `SharedPool`: candidates come from what its earlier requests have left, and what this
            one answers joins it once it is finished.
        execution: how a step runs, "auto", "eager", "packed", "native", "captured" or "compiled" (see `Target`).
        release: where a step runs as native code, which has a copy of the weights, the model gives up its own: it is
            in memory once, and can do nothing any more but answer through this library.
        parallel: the ranks that share every step, as `ld.parallel()` gives them.

    Attributes:
        stats: counts of the last call.
        finish_reasons: of each sequence of the last call, "stop" or "length".
    """

    def __init__(
        self,
        config: LookaheadConfig | None = None,
        *,
        streamer: BaseStreamer | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_strings: str | Sequence[str] | None = None,
        seeds: Sequence[int] | None = None,
        seed: int | None = None,
        propose: Propose | None = None,
        shared: Namespace | None = None,
        execution: str = "auto",
        release: bool = False,
        parallel: Ranks | None = None,
    ) -> None:
        if streamer is not None and not (hasattr(streamer, "put") and hasattr(streamer, "end")):
            raise TypeError(f"streamer must have put and end, as TextStreamer has, got {type(streamer).__name__}")
        if propose is not None and not callable(propose):
            raise TypeError(f"propose must be a function of the text's tokens, got {type(propose).__name__}")
        if parallel is not None and not isinstance(parallel, Ranks):
            raise TypeError(f"parallel must be what ld.parallel() gives, got {type(parallel).__name__}")
        if execution not in EXECUTIONS:
            raise ValueError(f"execution must be one of {', '.join(EXECUTIONS)}, got {execution!r}")
        if release and parallel is not None:
            raise ValueError("release: ranks compare their weights and keep them; leave it out")
        if config is not None and not isinstance(config, LookaheadConfig):
            raise TypeError(f"config must be a LookaheadConfig, got {type(config).__name__}")
        if stop_strings is not None and tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer= as well")
        self.config = config or LookaheadConfig()
        self.streamer = streamer
        self.tokenizer = None if tokenizer is None else check_tokenizer(tokenizer)
        self.stop_strings = _texts(stop_strings)
        if seeds is not None and seed is not None:
            raise ValueError("seed and seeds exclude each other: give one of them")
        self.seeds = _seeds(seeds)
        self.seed = None if seed is None else _seed(seed, "seed must be an integer")
        self.propose = propose
        self.shared = _shared(shared, self.config)
        self.execution = execution
        self.release = release
        self.parallel = parallel
        self.stats = Stats()
        self.finish_reasons: list[str] = []
        self._served: WeakSet[PreTrainedModel] = WeakSet()

    def close(self) -> None:
        """Give back the memory that models served so far hold for later calls: captured steps, copies of weights.

        The next call makes anew what it needs. Models that are gone have given theirs back, and one that has given up
        its own weights (`release`) has nothing left: it must be loaded again.
        """
        for model in self._served:
            memory_of(model).close()

    def __repr__(self) -> str:
        settings = "default settings" if self.config == LookaheadConfig() else repr(self.config)
        last = f"; last call: {self.stats.summary}" if self.stats.forwards else ""
        return f"<LookaheadDecoding: {settings}{last}>"

    def _repr_html_(self) -> str:
        return self.stats._repr_html_()

    def __call__(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """The decoding loop; called by `generate` with what it prepared.

        Raises:
            ValueError: an option that cannot be honoured; the message says what to do.
        """
        run = self.prepare(model, input_ids, logits_processor, stopping_criteria, generation_config, **model_kwargs)
        if self.streamer is None:
            for _ in run.steps():
                pass
        else:
            self.streamer.put(input_ids.cpu())
            for (choice,) in run.steps():
                for token in choice.tokens if choice else ():
                    self.streamer.put(torch.tensor([token]))
            self.streamer.end()
        self.finish_reasons = run.finish_reasons
        return run.output()

    def prepare(
        self,
        model: PreTrainedModel,
        input_ids: torch.Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Run:
        """Everything before the first forward: also a `custom_generate`, to take the steps one by one."""
        probe(model)
        self._served.add(model)
        _refuse(model, generation_config, model_kwargs)
        if not input_ids.shape[1]:
            raise ValueError("input_ids: the prompt is empty; give at least one token")
        check_ids(model, input_ids, _has_images(model_kwargs))
        inputs = {name: value for name, value in model_kwargs.items() if name in _PROMPT_INPUTS and _says(value)}
        context = context_of(model)
        if context is not None and input_ids.shape[1] > context:
            raise ValueError(
                f"input_ids: the prompt has {input_ids.shape[1]:,} tokens and the model's context is {context:,}; "
                "shorten it"
            )
        if self.streamer is not None and len(input_ids) > 1:
            raise ValueError(f"a streamer takes one sequence, got {len(input_ids)}: stream them one by one")
        if self.stop_strings:
            stops = StopStringCriteria(self.tokenizer, self.stop_strings)
            stopping_criteria = StoppingCriteriaList([*stopping_criteria, stops])
        # The caller's cache or, since not every version of transformers marks it, the empty one that `generate` made.
        past = cache_in(model_kwargs)
        if generation_config.cache_implementation is not None or past is None:
            past = DynamicCache(config=text_config(model))
        rows, usual = _layout(input_ids, model_kwargs, past, generation_config)
        if not usual:
            inputs["position_ids"] = model_kwargs["position_ids"]
        if self.parallel is None and any(hasattr(p, "to_local") for p in model.parameters()):
            raise ValueError(
                "the model is divided over ranks, which take steps together: pass parallel=ld.parallel()'s"
            )
        if self.parallel is not None and self.parallel.size > 1:
            _agree(self, self.parallel, input_ids, inputs, logits_processor, stopping_criteria, generation_config)
        asked = (input_ids, logits_processor, stopping_criteria, generation_config)
        requests = _requests(self, *asked, rows, text_config(model).vocab_size)
        before = past.get_seq_length()
        longest = before + max(r.limit - r.cached for r in requests)
        rows_of_tree = max_rows(self.config, own_source=self.propose is not None)
        capacity = longest + rows_of_tree
        size = {"capacity": capacity, "batch": len(requests), "execution": self.execution, "max_rows": rows_of_tree}
        if self.release and inputs:
            raise ValueError(f"release: {', '.join(inputs)} needs the model's own weights; leave release out")
        target = (
            Target(model, **size, released=self.release)
            if self.parallel is None
            else ShardedTarget(model, **size, ranks=self.parallel)
        )
        target.check_length(before + max(len(r.prompt) - r.cached for r in requests), longest)
        if before:
            known = requests[0].prompt[: requests[0].cached] if requests[0].cached == before else None
            target.load(past, [range(row.start, before) for row in rows], known)
        self.stats = Stats()
        starts = [row.start for row in rows]
        return Run(self.config, target, requests, self.stats, generation_config, past, starts, inputs)


@dataclass(frozen=True)
class Run:
    """A prepared call of `generate`.

    Attributes:
        config: the sources, and what is fixed.
        target: the model with room for the requests.
        requests: one per sequence.
        stats: counts, updated as the steps are taken.
        generation_config: as `generate` prepared it.
        past: the caller's cache, or a new one; filled at the end.
        starts: left padding of each sequence.
        inputs: of the model's own, such as images, that belong to the prompts.
    """

    config: LookaheadConfig
    target: Target
    requests: list[Request]
    stats: Stats
    generation_config: GenerationConfig
    past: DynamicCache
    starts: list[int]
    inputs: dict[str, Any]

    def steps(self) -> Iterator[list[Choice | None]]:
        """Decode, a step at a time."""
        return decode(self.target, self.requests, self.config, self.stats, self.inputs)

    @property
    def finish_reasons(self) -> list[str]:
        """Why each sequence ended, "stop" or "length"; empty for one that has not."""
        return [r.sampler.finish_reason or "" for r in self.requests]

    def output(self) -> GenerateDecoderOnlyOutput | torch.Tensor:
        """What `generate` returns, once all steps are taken."""
        config, samplers = self.generation_config, [r.sampler for r in self.requests]
        self.target.store(self.past, self.starts)
        pad, end = _first(config._pad_token_tensor), max(s.length for s in samplers)
        texts = [torch.nn.functional.pad(s.text[0], (0, end - s.length), value=pad) for s in samplers]
        sequences = torch.stack(texts)  # (batch, length)
        if not config.return_dict_in_generate:
            return sequences
        return GenerateDecoderOnlyOutput(
            sequences=sequences,
            scores=_stack([s.scores for s in samplers]) if config.output_scores else None,
            logits=_stack([s.logits for s in samplers]) if config.output_logits else None,
            **{str(cache_name(GenerateDecoderOnlyOutput)): self.past},
        )


def generate(
    model: PreTrainedModel,
    inputs: torch.Tensor | None = None,
    *,
    lookahead: LookaheadConfig | LookaheadDecoding | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    streamer: BaseStreamer | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **kwargs: Any,
) -> GenerateDecoderOnlyOutput | torch.Tensor:
    """`model.generate` with lookahead decoding: the same arguments, the same tokens, fewer forwards.

    Args:
        model: any causal language model that can check candidates, also as PEFT or torch.compile wrapped it.
        inputs: token ids, (batch, length); or `input_ids=`, as a tokenizer names them.
        lookahead: the configuration, or a `LookaheadDecoding` whose `stats` are then filled.
        seed, seeds, streamer, tokenizer: as for `LookaheadDecoding`.
        kwargs: everything else that `model.generate` takes.

    Returns:
        What `model.generate` returns: token ids (batch, length), or a `GenerateDecoderOnlyOutput`. Scores and logits of
        a sequence that ended before others are zero from there on.

    Raises:
        TypeError, ValueError: an argument that is wrong or cannot be honoured; the message says what to do.
    """
    if not isinstance(lookahead, LookaheadDecoding | LookaheadConfig | None):
        raise TypeError(
            f"lookahead must be a LookaheadConfig or a LookaheadDecoding, got {lookahead!r}; or leave it out"
        )
    base = lookahead if isinstance(lookahead, LookaheadDecoding) else LookaheadDecoding(lookahead)
    model = unwrapped(model)
    decoding = LookaheadDecoding(
        base.config,
        streamer=streamer if streamer is not None else base.streamer,
        tokenizer=tokenizer if tokenizer is not None else base.tokenizer,
        seeds=base.seeds if seeds is None and seed is None else seeds,
        seed=base.seed if seeds is None and seed is None else seed,
        propose=base.propose,
        shared=base.shared,
        execution=base.execution,
        release=base.release,
        parallel=base.parallel,
    )
    decoding.stop_strings = base.stop_strings
    try:
        result: GenerateDecoderOnlyOutput | torch.Tensor = call_generate(
            model, decoding, decoding, inputs=inputs, **kwargs
        )
        return result
    finally:
        base.stats, base.finish_reasons = decoding.stats, decoding.finish_reasons
        base._served |= decoding._served


def context_of(model: PreTrainedModel) -> int | None:
    """The model's context in tokens, or None where its configuration has none."""
    context: int | None = getattr(text_config(model), "max_position_embeddings", None)
    switch = switch_of(model)
    return None if switch and switch.plain_after else context  # which dynamic scaling goes past


def call_generate(model: PreTrainedModel, decoding: LookaheadDecoding, loop: Any, **kwargs: Any) -> Any:
    """Call `model.generate` with `loop` as its decoding loop, and what it would keep from it in `decoding`.

    Args:
        decoding: takes the stop strings, for which it needs its tokenizer.
        loop: `decoding` itself, or its `prepare`.
        kwargs: everything that `model.generate` takes.
    """
    for name, what in GENERATE_PARAMETERS.items():
        value = kwargs.pop(name, None) if what != _HONOURED else None
        if value is not None and value is not False:
            raise ValueError(f"{name}: {what}")
    if kwargs.pop("assistant_tokenizer", None) is not None:
        raise ValueError(f"assistant_tokenizer: {_ASSISTED}")
    if kwargs.get("cache_implementation") == "paged":
        raise ValueError("cache_implementation='paged' is continuous batching: use model.generate_batch")
    for name in ("inputs", "input_ids"):
        if kwargs.get(name) is not None:
            check_ids(model, kwargs[name], _has_images(kwargs))
    for name in ("max_new_tokens", "max_length"):
        if isinstance(kwargs.get(name), str | bool | float):
            raise TypeError(f"{name} must be an integer, got {kwargs[name]!r}")
    for name in ("attention_mask", "position_ids"):
        if kwargs.get(name) is not None and not isinstance(kwargs[name], torch.Tensor):
            raise TypeError(f"{name} must be a tensor, (batch, length), got {type(kwargs[name]).__name__}")
    for name, kind in (("logits_processor", "LogitsProcessorList"), ("stopping_criteria", "StoppingCriteriaList")):
        if kwargs.get(name) is not None and not isinstance(kwargs[name], list):
            raise TypeError(f"{name} must be a {kind}, such as {kind}([...]), got {type(kwargs[name]).__name__}")
    config = kwargs.get("generation_config")
    if config is not None and not isinstance(config, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(config).__name__}")
    past = cache_in(kwargs)
    if past is not None and type(past) is not DynamicCache:
        raise ValueError(f"past_key_values must be a DynamicCache, got {type(past).__name__}")
    stops = kwargs.pop("stop_strings", None)
    if stops is None and config is not None and config.stop_strings is not None:
        stops = config.stop_strings
        kwargs["generation_config"] = copy.deepcopy(config)
        kwargs["generation_config"].stop_strings = None
    if stops is not None:
        if decoding.tokenizer is None:
            raise ValueError("stop_strings needs the tokenizer: pass tokenizer= as well")
        decoding.stop_strings = [stops] if isinstance(stops, str) else list(stops)
    if model.generation_config.stop_strings is not None:
        raise ValueError(
            "the model's generation config sets stop_strings: set model.generation_config.stop_strings = None and pass "
            "stop_strings= and tokenizer="
        )
    return model.generate(custom_generate=loop, **kwargs)


def _refuse(model: PreTrainedModel, config: GenerationConfig, model_kwargs: dict[str, Any]) -> None:
    for name, reason in GENERATION_CONFIG_FIELDS.items():
        value = getattr(config, name, None)
        if reason in (_HONOURED, _IRRELEVANT) or value in _SILENT.get(name, (None, False)):
            continue
        if reason != _ENGINE:
            raise ValueError(f"{name}={value!r}: {reason}")
        if value != getattr(model.generation_config, name, None):
            raise ValueError(f"{name}={value!r}: lookahead decoding brings its own cache and step; leave it out")
    for name, value in model_kwargs.items():
        if name not in _MODEL_INPUTS | _PROMPT_INPUTS and value is not None and value is not False:
            raise ValueError(
                f"{name}: lookahead decoding gives its steps no such input; leave it out, or use model.generate"
            )


@dataclass(frozen=True)
class _Row:
    """Where one sequence of the batch stands.

    Attributes:
        start: left padding in front of it, in the columns of the mask.
        skip: left padding in front of it, in the columns of the ids.
        cached: tokens of the ids that the caller's cache holds already.
    """

    start: int
    skip: int
    cached: int


def _layout(
    ids: torch.Tensor, model_kwargs: dict[str, Any], past: Any, config: GenerationConfig
) -> tuple[list[_Row], bool]:
    """One row per sequence, and whether positions are counted in the usual way.

    With a caller's cache the ids are either the whole text or what is new of it.
    """
    if type(past) is not DynamicCache:
        raise ValueError(f"past_key_values must be a DynamicCache, got {type(past).__name__}")
    covered = past.get_seq_length()
    mask, length = model_kwargs.get("attention_mask"), ids.shape[1]
    total = mask.shape[1] if mask is not None else getattr(config, "_mask_length", length)
    starts = [0] * len(ids)
    if mask is not None:
        starts = mask.ne(0).int().argmax(dim=1).tolist()
        for row, start in enumerate(starts):
            if not bool(mask[row, start:].all()):
                raise ValueError(f"attention_mask must pad on the left only; row {row} has zeros after its first token")
    if total not in (length, covered + length):
        raise ValueError(
            f"attention_mask has {total} columns, but the ids have {length} tokens and past_key_values holds {covered}"
        )
    whole = total == length
    if whole and covered >= length:
        raise ValueError(f"past_key_values covers all {length} tokens: give at least one new one")
    positions, usual = model_kwargs.get("position_ids"), True
    if positions is not None:
        if positions.shape[-1] > total:
            raise ValueError("position_ids: only those that follow the attention mask are supported; leave it out")
        first = torch.tensor(starts, device=positions.device)[:, None]
        wanted = torch.arange(total, device=positions.device)[None] - first  # (batch, total)
        wanted = wanted[:, total - positions.shape[-1] :]
        usual = not bool((positions.ne(wanted) & wanted.ge(0)).any())
        if not usual and positions.ndim == 2:
            raise ValueError("position_ids: only those that follow the attention mask are supported; leave it out")
    return [_Row(s, s if whole else 0, max(0, covered - s) if whole else 0) for s in starts], usual


def _requests(
    decoding: LookaheadDecoding,
    ids: torch.Tensor,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    rows: list[_Row],
    vocabulary: int,
) -> list[Request]:
    ends = [c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)]
    if not ends:
        raise ValueError("the request has no end: give max_new_tokens")
    max_length = max(min(ends), ids.shape[1] + 1)
    batch = len(ids)
    stop_ids = {t for c in criteria if type(c) is EosTokenCriteria for t in c.eos_token_id.tolist()}
    others = [c for c in criteria if type(c) is not EosTokenCriteria and not isinstance(c, MaxLengthCriteria)]
    seeds = decoding.seeds if decoding.seed is None else [decoding.seed + number for number in range(batch)]
    generators = _generators(seeds, batch, bool(config.do_sample), ids.device)
    pad = config._pad_token_tensor
    together = decoding.parallel is not None and decoding.parallel.size > 1
    requests = []
    for row, (place, generator) in enumerate(zip(rows, generators, strict=True)):
        own = list(processors) if batch == 1 else [_for_row(p, row, batch) for p in processors]
        ending = others if batch == 1 else [_for_row(c, row, batch) for c in others]
        if together:
            refuse_what_cannot_follow(own, ending, ids[row : row + 1], vocabulary)
        sampler = Sampler(
            ids[row : row + 1],
            max_length,
            stop_ids=tuple(stop_ids),
            processors=own,
            criteria=ending,
            do_sample=bool(config.do_sample),
            generator=generator,
            keep_scores=bool(config.return_dict_in_generate and config.output_scores),
            keep_logits=bool(config.return_dict_in_generate and config.output_logits),
            follows=together,
        )
        prompt = tuple(ids[row, place.skip :].tolist())
        barred = frozenset(stop_ids | ({_first(pad)} if pad is not None and stop_ids else set()))  # not worth guessing
        limit = max_length - place.skip
        requests.append(Request(prompt, sampler, limit, barred, decoding.propose, decoding.shared, place.cached))
    return requests


def _agree(
    decoding: LookaheadDecoding,
    ranks: Ranks,
    ids: torch.Tensor,
    inputs: dict[str, Any],
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
) -> None:
    """See that all ranks were asked the same, and give them the first one's random state."""
    ranks.agree(
        {
            "prompt": f"{len(ids)} x {ids.shape[1]} tokens, checksum {zlib.crc32(str(ids.tolist()).encode()):08x}",
            "max_length": config.max_length,
            "do_sample": config.do_sample,
            "generation config": sorted(config.to_diff_dict().items()),
            "logits_processor": [type(p).__name__ for p in processors],
            "stopping_criteria": [type(c).__name__ for c in criteria],
            "stop_strings": decoding.stop_strings,
            "further sources": [n for n in ("propose", "shared") if getattr(decoding, n) is not None],
            "seeds": (decoding.seed, decoding.seeds),
            "execution": decoding.execution,
            "inputs": {name: zlib.crc32(repr(state_of(value)).encode()) for name, value in inputs.items()},
        }
    )
    for name in ("output_scores", "output_logits"):
        if ranks.shards > 1 and config.return_dict_in_generate and getattr(config, name):
            raise ValueError(f"{name}: only the rank that chose a token has its scores; ask for them on one device")
    if config.do_sample:
        ranks.random_state()


def _generators(
    seeds: list[int] | None, batch: int, do_sample: bool, device: torch.device
) -> list[torch.Generator | None]:
    if seeds is not None and len(seeds) != batch:
        raise ValueError(f"seeds must have one entry per sequence, {batch} here, got {len(seeds)}")
    if not do_sample or (seeds is None and batch == 1):
        return [None] * batch
    if seeds is None:
        seeds = torch.randint(2**62, (batch,)).tolist()
    return [torch.Generator(device).manual_seed(seed) for seed in seeds]


def _copied(item: Any) -> Any:
    try:
        return copy.deepcopy(item)
    except Exception as error:
        raise ValueError(
            f"{type(item).__name__} cannot be copied ({error}), and each sequence of a batch needs its own: decode "
            "the sequences one by one"
        ) from error


def _for_row(processor: Any, row: int, batch: int) -> Any:
    """A processor's copy for one sequence of a batch.

    `generate` builds some of them with a state per sequence. A processor of the caller's that depends on the number of
    the sequence may have a method `for_row(number)` that gives the one to use.
    """
    if isinstance(processor, PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return PrefixConstrainedLogitsProcessor(lambda _, text: allowed(row, text), 1)
    own = _copied(processor)
    if hasattr(own, "for_row"):
        return own.for_row(row)
    if isinstance(own, RepetitionPenaltyLogitsProcessor):
        for name, value in vars(own).items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == batch:
                setattr(own, name, value[row : row + 1])
    elif isinstance(own, EncoderRepetitionPenaltyLogitsProcessor):
        row //= batch // len(own.encoder_input_ids)  # made before the sequences were multiplied
        own.encoder_input_ids = own.encoder_input_ids[row : row + 1]
    elif isinstance(own, EncoderNoRepeatNGramLogitsProcessor):
        row //= batch // own.batch_size
        own.generated_ngrams, own.batch_size = own.generated_ngrams[row : row + 1], 1
    return own


def _first(tensor: torch.Tensor | None) -> int:
    return int(tensor.flatten()[0]) if tensor is not None else 0


def _stack(rows: list[tuple[torch.Tensor, ...]]) -> tuple[torch.Tensor, ...]:
    """Per-sequence rows, (1, vocab) each, to one (batch, vocab) per emitted token."""
    blank = torch.zeros_like(rows[0][0])
    return tuple(torch.cat([row[i] if i < len(row) else blank for row in rows]) for i in range(max(map(len, rows))))
