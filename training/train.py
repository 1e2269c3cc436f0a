"""Train `pocket` on the text that `prepare.py` built.

The schedule follows the clock, so that the same command gives a finished model in any amount of time: the learning
rate warms up for 2 % of `--minutes`, holds, and falls linearly to zero over the last half. Two-dimensional hidden
weights are trained with Muon, everything else with AdamW. `--resume` continues from the last checkpoint, and the
minutes already spent count.

    python training/train.py --data build/pocket --out build/pocket/model --minutes 9.5 --batch 64      # a GPU
    python training/train.py --data build/pocket --out build/pocket/model --minutes 150 --batch 8 --short-context 256

Writes `checkpoint.pt` while it runs, and a loadable bfloat16 model with its tokenizer and `training.jsonl` at the end.
`--start-from` goes on from a trained model with a fresh schedule, and adds a line to what is recorded of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

CONTEXT = 1024
SHORT_SHARE = 0.6  # of the minutes are trained at --short-context, the rest at CONTEXT
WARMUP_SHARE, DECAY_SHARE = 0.02, 0.5


def pocket_config(end_token: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=4096,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_token,
        pad_token_id=end_token,
    )


class Batches:
    """Random windows of the token streams, on the device."""

    def __init__(self, data: Path, device: str, seed: int) -> None:
        packed = np.load(data / "tokens.npz") if (data / "tokens.npz").exists() else None
        names = ("modules", "functions")
        arrays = [packed[n] if packed is not None else np.load(data / f"{n}.npy") for n in names]
        self.streams = [torch.from_numpy(a.astype(np.int16)).to(device) for a in arrays]
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device = device

    def windows(self, stream: torch.Tensor, count: int, length: int) -> torch.Tensor:
        starts = torch.randint(len(stream) - length - 1, (count, 1), generator=self.generator, device=self.device)
        return stream[starts + torch.arange(length + 1, device=self.device)].long()  # (count, length + 1)

    def draw(self, count: int, length: int, functions_share: float) -> torch.Tensor:
        single = round(count * functions_share)
        modules, functions = self.streams
        return torch.cat([self.windows(modules, count - single, length), self.windows(functions, single, length)])


def optimizers(model: nn.Module, lr: float, muon: bool) -> list[torch.optim.Optimizer]:
    if not muon:
        return [torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.01)]
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    other = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    return [
        torch.optim.Muon(hidden, lr=lr, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(other, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate(progress: float) -> float:
    return min(1.0, progress / WARMUP_SHARE, max(0.0, (1 - progress) / DECAY_SHARE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, required=True)
    parser.add_argument("--batch", type=int, default=64, help="windows of 1,024 tokens per optimizer step")
    parser.add_argument("--short-context", type=int, default=CONTEXT)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--optimizer", choices=("muon", "adamw"), default="muon")
    parser.add_argument("--functions-share", type=float, default=0.25)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--start-from", type=Path, help="a trained model to go on from, with a fresh schedule")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    checkpoint = args.out / "checkpoint.pt"

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(args.data / "tokenizer")
    model = LlamaForCausalLM(pocket_config(tokenizer.eos_token_id)).to(args.device)
    if args.start_from:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(args.start_from, dtype=torch.float32).state_dict())
    steppers = optimizers(model, args.lr, args.optimizer == "muon")
    step, tokens, spent = 0, 0, 0.0
    if args.resume:
        state = torch.load(checkpoint, map_location=args.device, weights_only=True)
        model.load_state_dict(state["model"])
        for stepper, saved in zip(steppers, state["optimizers"], strict=True):
            stepper.load_state_dict(saved)
        step, tokens, spent = state["step"], state["tokens"], state["minutes"]
    batches = Batches(args.data, args.device, seed=step)

    @torch.compile(disable=args.device == "cpu")
    def loss_of(ids: torch.Tensor) -> torch.Tensor:
        with torch.autocast(args.device, torch.bfloat16, enabled=args.device != "cpu"):  # slower than float32 there
            logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return nn.functional.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten())

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimizers": [s.state_dict() for s in steppers],
            "step": step,
            "tokens": tokens,
            "minutes": spent,
        }
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").rename(checkpoint)

    warm_up = batches.draw(args.batch, CONTEXT, args.functions_share)
    torch.autograd.backward(loss_of(warm_up))  # compile outside the schedule
    model.zero_grad()
    began, saved_at, shown, losses = time.monotonic() - 60 * spent, spent, -1.0, []
    while spent < args.minutes:
        progress = spent / args.minutes
        length = args.short_context if progress < SHORT_SHARE else CONTEXT
        ids = batches.draw(args.batch * CONTEXT // length, length, args.functions_share)
        loss = loss_of(ids)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            for group in stepper.param_groups:
                group["lr"] = args.lr * rate(progress)
            stepper.step()
            stepper.zero_grad()
        step, tokens = step + 1, tokens + ids[:, 1:].numel()
        losses.append(loss.detach())
        if step % 20 == 0 and args.device != "cpu":
            torch.cuda.synchronize()
        spent = (time.monotonic() - began) / 60
        if spent - shown > args.minutes / 40:
            mean = torch.stack(losses).mean().item()
            print(f"{spent:7.2f} min  step {step:6}  {tokens / 1e6:8.1f} M tokens  loss {mean:.4f}", flush=True)
            shown, losses = spent, []
        if spent - saved_at > args.checkpoint_minutes:
            save()
            saved_at = spent
    save()
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    device = torch.cuda.get_device_name() if args.device == "cuda" else f"{torch.get_num_threads()} CPU threads"
    record = {"device": device, "minutes": round(spent, 1), "steps": step, "tokens": tokens, "batch": args.batch}
    record |= {
        "short_context": args.short_context,
        "lr": args.lr,
        "functions_share": args.functions_share,
        "optimizer": args.optimizer,
        "torch": torch.__version__,
    }
    told = args.start_from / "training.jsonl" if args.start_from else None
    before = told.read_text() if told is not None and told.exists() else ""
    (args.out / "training.jsonl").write_text(before + json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
