"""Measure the engine beside transformers + PEFT, on this machine, in one run.

Makes a small random Llama (33M parameters, float32) and measures, round after round, ours and
theirs in turn:

- finetuning tokens/s: LoRA rank 16 on all seven projections, AdamW, one 512-token sequence a step;
- decode tokens/s: 8 prompts of 128 tokens, 64 new tokens each, greedy (`generate` on their side);
- then the engine doing both at once, against itself doing one after the other.

Prints a table, writes `benchmark.json` and `benchmark.png`. Ratios are medians over the rounds.
"""

import argparse
import json
import platform
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import matplotlib
import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from flexllm_jax import LLM, FinetuneConfig, OptimizerConfig, PeftConfig, SamplingParams

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SEQUENCE, PROMPT, PROMPTS, NEW_TOKENS, RANK = 512, 128, 8, 64, 16
VOCABULARY = 8192
TPOT_MS = 250.0  # the objective while co-serving
SAMPLING = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True)


def make_model(path: Path) -> None:
    """A random 33M-parameter Llama whose tokenizer has one letter-like token per id."""
    if (path / "config.json").exists():
        return
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    words = {chr(0x4E00 + i): i for i in range(VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(0x4E00)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def random_tokens(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Token ids [rows, length]."""
    return rng.integers(10, VOCABULARY, (rows, length))


def write_rows(path: Path, tokens: np.ndarray) -> Path:
    """A dataset whose rows become exactly these tokens."""
    rows = ("".join(chr(0x4E00 + int(t)) for t in row) for row in tokens)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


class Ours:
    """The engine."""

    def __init__(self, model: Path, out: Path):
        self.out = out
        self.jobs = 0
        self.llm = LLM(
            model,
            dtype="float32",
            max_model_len=SEQUENCE,
            cache={"page_size": 16},
            scheduler={
                "max_tokens_per_step": SEQUENCE,
                "max_sequences": PROMPTS,
                "slo": {"tpot_ms": TPOT_MS},
            },
            compile={"token_buckets": [PROMPTS, 128, SEQUENCE]},
            adapter_bank={"slots": 3, "max_rank": RANK},
            finetune={
                "max_tokens": SEQUENCE,
                "window": SEQUENCE // 2,
                "saved": "all",
                "idle_step_ms": 1000,
                "checkpoint_every": 0,
            },
            output_dir=str(out),
        )

    def start_job(self, rows: Path, steps: int):
        """A finetuning job of one sequence a step."""
        self.jobs += 1
        return self.llm.finetune(
            FinetuneConfig(
                name=f"job{self.jobs}",
                dataset=rows,
                format="text",
                steps=steps,
                batch_tokens=SEQUENCE,
                train_on="all",
                max_seq_len=SEQUENCE,
                peft=PeftConfig(r=RANK, alpha=2 * RANK),
                optimizer=OptimizerConfig(lr=1e-4),
                resume=False,
            )
        )

    def finetune(self, rows: Path, steps: int) -> float:
        """Tokens per second between the first step and the last."""
        times = self.start_job(rows, steps + 1).wait().step_times
        self.llm.unload_adapter(f"job{self.jobs}")
        return steps * SEQUENCE / (times[-1] - times[0])

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        started = time.perf_counter()
        outputs = self.llm.generate(prompts.tolist(), SAMPLING)
        seconds = time.perf_counter() - started
        return sum(len(o.token_ids) for o in outputs) / seconds


class Theirs:
    """transformers and PEFT."""

    def __init__(self, model: Path):
        self.base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
        config = PeftLoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
        other = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        self.peft = get_peft_model(other, config).train()
        trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(self, row: np.ndarray) -> None:
        """One optimizer step on one sequence."""
        tokens = torch.from_numpy(row)[None]
        self.peft(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def finetune(self, rows: np.ndarray) -> float:
        """Tokens per second."""
        self.step(rows[0])
        started = time.perf_counter()
        for row in rows:
            self.step(row)
        return rows.size / (time.perf_counter() - started)

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        tokens = torch.from_numpy(prompts)
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self.base.generate(  # pyright: ignore[reportAttributeAccessIssue]
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=NEW_TOKENS,
                min_new_tokens=NEW_TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
        seconds = time.perf_counter() - started
        return (outputs.shape[1] - PROMPT) * PROMPTS / seconds


def coserve(ours: Ours, rng: np.random.Generator, rows: Path, steps: int) -> dict:
    """Requests and a job together, and the same requests and job one after the other."""
    prompts = random_tokens(rng, 2 * PROMPTS, PROMPT).tolist()
    tpot = {}

    def serve() -> list[float]:
        return [o.tpot_s for o in ours.llm.generate(prompts, SAMPLING) if o.tpot_s]

    started = time.perf_counter()
    tpot["alone"] = serve()
    job = ours.start_job(rows, steps).wait()
    sequential_s = time.perf_counter() - started
    ours.llm.unload_adapter(job.name)

    started = time.perf_counter()
    job = ours.start_job(rows, steps)
    tpot["coserved"] = serve()
    served_s, steps_beside = time.perf_counter() - started, job.steps
    job.wait()
    together_s = time.perf_counter() - started
    ours.llm.unload_adapter(job.name)
    return {
        "sequential_s": sequential_s,
        "together_s": together_s,
        "finetune_tokens_per_s_beside_requests": steps_beside * SEQUENCE / served_s,
        "tpot_ms_alone": 1e3 * float(np.mean(tpot["alone"])),
        "tpot_ms_coserved": 1e3 * float(np.mean(tpot["coserved"])),
    }


def plot(result: dict, file: Path) -> None:
    """Ours beside theirs, and together beside one after the other."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
    for axis, kind in zip(axes, ("finetune", "decode"), strict=False):
        for i, side in enumerate(("theirs", "ours")):
            values = result[kind][side]
            axis.bar(i, median(values), color=("#9aa5b1", "#2f6fb0")[i], width=0.6)
            axis.plot([i] * len(values), values, ".", color="black", markersize=4)
        axis.set_xticks([0, 1], ["transformers\n+ PEFT", "flexllm_jax"])
        axis.set_title(f"{kind}, tokens/s (ratio {result[kind]['ratio']:.2f})")
    both = result["coserving"]
    names = ["one after\nthe other", "co-served"]
    axes[2].bar(names, [both["sequential_s"], both["together_s"]], color="#2f6fb0", width=0.6)
    axes[2].set_title("requests and job, seconds")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=150)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=6, help="finetuning steps a round")
    arguments = parser.parse_args()
    out: Path = arguments.out
    out.mkdir(parents=True, exist_ok=True)
    make_model(out / "model")
    rng = np.random.default_rng(0)
    rows = random_tokens(rng, arguments.steps, SEQUENCE)
    dataset = write_rows(out / "rows.jsonl", rows)
    ours, theirs = Ours(out / "model", out), Theirs(out / "model")
    ours.decode(random_tokens(rng, PROMPTS, PROMPT))
    theirs.decode(random_tokens(rng, PROMPTS, PROMPT))

    result: dict = {kind: {"ours": [], "theirs": []} for kind in ("finetune", "decode")}
    for i in range(arguments.rounds):
        result["finetune"]["theirs"].append(theirs.finetune(rows))
        result["finetune"]["ours"].append(ours.finetune(dataset, arguments.steps))
        prompts = random_tokens(rng, PROMPTS, PROMPT)
        result["decode"]["theirs"].append(theirs.decode(prompts))
        result["decode"]["ours"].append(ours.decode(prompts))
        print(
            f"round {i + 1}:",
            {k: {s: round(v[-1], 1) for s, v in r.items()} for k, r in result.items()},
            flush=True,
        )
    for kind in result.values():
        ratios = [a / b for a, b in zip(kind["ours"], kind["theirs"], strict=True)]
        kind["ratio"] = median(ratios)
    result["coserving"] = coserve(ours, rng, dataset, 2 * arguments.steps)
    engine = ours.llm.engine
    result["environment"] = {
        "machine": platform.machine(),
        "recompiles_after_warmup": engine.runner.compilations.count,
        "versions": {p: version(p) for p in ("jax", "flax", "torch", "transformers", "peft")},
    }
    ours.llm.close()

    table = Table(title="33M-parameter Llama, float32, medians")
    for column in ("", "transformers + PEFT", "flexllm_jax", "ours ÷ theirs", "target"):
        table.add_column(column, justify="left" if not column else "right")
    for kind, target in (("finetune", 0.9), ("decode", 2.0)):
        r = result[kind]
        cells = (f"{median(r['theirs']):.1f}", f"{median(r['ours']):.1f}", f"{r['ratio']:.2f}")
        table.add_row(f"{kind} tokens/s", *cells, f">= {target}")
    console = Console()
    console.print(table)
    both = result["coserving"]
    console.print(
        f"co-serving: {both['together_s']:.1f} s together, {both['sequential_s']:.1f} s one after "
        f"the other; {both['finetune_tokens_per_s_beside_requests']:.0f} finetuning tokens/s "
        f"beside requests; TPOT {both['tpot_ms_coserved']:.1f} ms "
        f"(alone {both['tpot_ms_alone']:.1f} ms)"
    )
    (out / "benchmark.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, out / "benchmark.png")
    console.print(f"written: {out / 'benchmark.json'}, {out / 'benchmark.png'}")


if __name__ == "__main__":
    main()
