"""Which causal language model types decode exactly, and how: writes docs/models.md.

    python -m benchmarks.models --out docs/models.md

Every type of the installed transformers is made tiny and random, and decoded through the whole loop, with drafts that
are right and wrong, beside `model.generate`, in float32. An error in a cache or a state changes the text of such a
model, and texts are longer than any window.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel
from transformers.utils import logging

import lookahead_decoding as ld
from benchmarks.drafts import right_and_wrong, watched
from benchmarks.tiny import NOT_MADE, TYPES, tiny_model, wide_model
from lookahead_decoding.hf.exactness import compare
from lookahead_decoding.model.evaluate import OURS, text_config
from lookahead_decoding.model.native.steps import why_no_native
from lookahead_decoding.model.probe import Strategy, probe

FREE = ((1, 1.0),)
CONFIG = ld.LookaheadConfig(sources=("window",), step_times=FREE, max_rows=24)
"""Drafts of the window beside those that are right and wrong, and rows that cost nothing."""
PROMPTS = (24, 13, 5)
"""Tokens of the three prompts; the first is longer than a window."""
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 0}


@dataclass(frozen=True)
class Result:
    """What was found out about a type.

    Attributes:
        strategy: "tree", "chain", "batch-expanded" or "refused"; "" where no tiny model can be made.
        attention: "ours", or the model's own by its name.
        greedy, sampled, batch: "exact", or what was not.
        program: "yes" if its steps run as native code, else why they do not.
        note: the reason of a refusal, and what else is worth knowing.
    """

    type: str
    strategy: str
    attention: str = ""
    greedy: str = ""
    sampled: str = ""
    batch: str = ""
    program: str = ""
    note: str = ""

    @property
    def exact(self) -> bool:
        return all(value.startswith("exact") for value in (self.greedy, self.sampled, self.batch))


def prompt(tokens: int, seed: int, vocab: int) -> torch.Tensor:
    """Random token ids, (1, tokens), none of them special."""
    return torch.randint(3, vocab, (1, tokens), generator=torch.Generator().manual_seed(seed))


def check(model_type: str, new_tokens: int = 300) -> Result:
    """Decode a tiny model of a type in all modes, beside `generate`."""
    if model_type in NOT_MADE:
        return Result(model_type, "", note=f"no tiny config: {NOT_MADE[model_type]}")
    model = tiny_model(model_type)
    try:
        strategy = probe(model)
    except ValueError as error:
        return Result(model_type, "refused", note=str(error).split(": ", 1)[1].removesuffix(". Use model.generate"))
    vocab = text_config(model).vocab_size
    alone = prompt(PROMPTS[0], 0, vocab)
    greedy = _compare(model, alone, new_tokens, {"do_sample": False})
    sampled = _compare(model, alone, new_tokens, SAMPLED)
    batch = _compare_batch(model, [prompt(n, i, vocab) for i, n in enumerate(PROMPTS)], new_tokens // 2)
    attention = "ours" if strategy.attention == OURS else strategy.attention
    return Result(model_type, strategy.name, attention, greedy, sampled, batch, program_of(model_type), _note(strategy))


def program_of(model_type: str) -> str:
    """Whether a model of a type has a program, or why not."""
    try:
        model = wide_model(model_type)
    except Exception:  # its configuration does not take such sizes
        return "not tried"
    return why_no_native(model).partition("(")[0].strip() or "yes"


def _note(strategy: Strategy) -> str:
    return strategy.reasons[-1] if strategy.reasons else ""


def _compare(model: PreTrainedModel, ids: torch.Tensor, new_tokens: int, mode: dict[str, Any]) -> str:
    options = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, **mode}
    torch.manual_seed(5)
    plain = model.generate(ids, **options)[0].tolist()
    source = right_and_wrong(plain, text_config(model).vocab_size)
    decoding = ld.LookaheadDecoding(CONFIG, propose=source)
    with watched() as seen:
        found = compare(model, ids, decoding, seed=5, **options)
    missing = {"full", "partial", "none"} - seen.kinds
    if found is not None:
        return f"{'near-tie' if found.near_tie else 'WRONG'} at {found.position} (margin {found.margin:.0e})"
    return "exact" if not missing else f"exact, without {', '.join(sorted(missing))} acceptance"


def _compare_batch(model: PreTrainedModel, prompts: Sequence[torch.Tensor], new_tokens: int) -> str:
    width = max(p.shape[1] for p in prompts)
    ids, mask = torch.zeros(2, len(prompts), width, dtype=torch.long)
    for row, one in enumerate(prompts):
        ids[row, width - one.shape[1] :], mask[row, width - one.shape[1] :] = one[0], 1
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0}
    options["do_sample"] = False
    plain = model.generate(ids, attention_mask=mask, **options)
    config = ld.LookaheadConfig(step_times=FREE, max_rows=16)
    ours = ld.generate(model, ids, attention_mask=mask, lookahead=config, **options)
    assert isinstance(ours, torch.Tensor)
    if torch.equal(ours, plain):
        return "exact"
    alone = [model.generate(p, **options)[0, p.shape[1] :] for p in prompts]
    if all(torch.equal(a, row[width:]) for a, row in zip(alone, ours, strict=True)):
        return "as alone"
    return "WRONG"


def table(results: Sequence[Result]) -> Iterator[str]:
    """The page, line by line."""
    made = [r for r in results if r.strategy]
    by_strategy = {name: [r for r in made if r.strategy == name] for name in ("tree", "chain", "batch-expanded")}
    exact = sum(r.exact for r in made)
    yield "# Model types"
    yield ""
    yield "Made by `python -m benchmarks.models --out docs/models.md`; do not edit."
    yield ""
    yield f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}, float32 on a CPU. Of"
    yield f"{len(results)} causal language model types **{exact} are exact** in all three modes below: "
    yield ", ".join(f"{sum(r.exact for r in rows)} as {name}" for name, rows in by_strategy.items()) + "; "
    yield f"{sum(r.strategy == 'refused' for r in made)} are refused, and of"
    yield f"{len(results) - len(made)} no tiny model can be made."
    yield ""
    yield "A model is probed by what it computes and not by its name ([design.md](design.md)), so this page is what"
    yield "the probe found for tiny random models of each type, and a check of it: 300 tokens greedy, 300 at"
    yield "temperature 0.8, and a greedy batch of three prompts of different lengths, token by token against"
    yield "`model.generate`, with drafts that are right, partly right and wrong."
    yield ""
    yield "* **tree**: any tree of candidates in one forward; **chain**: one candidate; **batch-expanded**: each"
    yield "  candidate as a row of the batch. Batches of the last two are decoded plainly."
    yield "* **attention** in a step: ours, or the model's own with a dense mask."
    yield "* **near-tie**: the two best tokens are closer than rounding, and in float64 the texts are the same"
    yield "  ([exactness.md](exactness.md))."
    yield "* **as alone**: `generate` itself gives a prompt another text when it is padded; ours has the text of the"
    yield "  prompt alone."
    yield "* **program**: a step runs as one call of native code on a CPU, and its logits are proven to be the model's;"
    yield "  or why it does not. Some configurations do not take the sizes that it needs, and were not tried."
    yield ""
    yield "| type | strategy | attention | greedy | sampled | batch | program | note |"
    yield "|---|---|---|---|---|---|---|---|"
    for r in results:
        cells = (
            r.type,
            r.strategy or "-",
            r.attention,
            r.greedy,
            r.sampled,
            r.batch,
            r.program,
            r.note.replace("|", "/"),
        )
        yield "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("types", nargs="*", default=TYPES, help="all by default")
    parser.add_argument("--new-tokens", type=int, default=300)
    parser.add_argument("--out", type=Path, help="the page; printed if left out")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for model_type in arguments.types:
        try:
            result = check(model_type, arguments.new_tokens)
        except Exception as error:  # of any type's own code: it must not cost the page
            result = Result(model_type, "refused", note=f"{type(error).__name__}: {str(error).splitlines()[0][:120]}")
        print(result, flush=True)
        results.append(result)
    if arguments.out:
        arguments.out.write_text("\n".join(table(results)) + "\n")


if __name__ == "__main__":
    main()
