"""The engine beside transformers + PEFT, in one run: for `benchmark_peft.py` and `gpu_suite.py`.

Round after round, ours and theirs in turn: finetuning tokens/s (LoRA on all seven projections,
AdamW, one sequence a step) and decode tokens/s (greedy; `generate` on their side). Then the engine
doing both at once, against itself doing one after the other.
"""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import matplotlib
import numpy as np
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from flexllm_jax import LLM, FinetuneConfig, OptimizerConfig, PeftConfig, SamplingParams

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TOKENS = 4096  # ids that prompts and rows are made of, each one letter of the tokenizer
FIRST_LETTER = 0x4E00


@dataclass(frozen=True)
class Workload:
    """What both sides do, and how the engine is set up for it.

    tpot_ms: the engine's objective while it does both at once. targets: least ours ÷ theirs.
    """

    title: str
    hf_config: dict
    dtype: str
    sequence: int
    prompts: int
    prompt: int
    new_tokens: int
    rank: int
    tpot_ms: float
    token_buckets: list[int]
    engine: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, float] = field(default_factory=dict)

    @property
    def sampling(self) -> SamplingParams:
        """Greedy, to the last token."""
        return SamplingParams(max_tokens=self.new_tokens, ignore_eos=True)


def torch_device() -> str:
    """The device of their side."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def make_model(path: Path, workload: Workload) -> None:
    """A random model whose tokenizer has one letter per token id."""
    if (path / "tokenizer.json").exists():
        return
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(workload.hf_config), encoding="utf-8")
    torch.manual_seed(0)
    with torch.device(torch_device()):
        model = AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(path), dtype=getattr(torch, workload.dtype)
        )
    model.save_pretrained(path)
    words = {chr(FIRST_LETTER + i): i for i in range(TOKENS)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=chr(FIRST_LETTER)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(path)


def random_tokens(rng: np.random.Generator, rows: int, length: int) -> np.ndarray:
    """Token ids [rows, length]."""
    return rng.integers(10, TOKENS, (rows, length))


def write_rows(path: Path, tokens: np.ndarray) -> Path:
    """A dataset whose rows become exactly these tokens."""
    rows = ("".join(chr(FIRST_LETTER + int(t)) for t in row) for row in tokens)
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows), encoding="utf-8")
    return path


class Ours:
    """The engine."""

    def __init__(self, model: Path, out: Path, workload: Workload):
        self.jobs = 0
        self.workload = workload
        fields: dict[str, Any] = {
            "dtype": workload.dtype,
            "max_model_len": max(workload.sequence, workload.prompt + workload.new_tokens),
            "scheduler": {
                "max_tokens_per_step": workload.token_buckets[-1],
                "max_sequences": workload.prompts,
                "slo": {"tpot_ms": workload.tpot_ms},
            },
            "compile": {"token_buckets": workload.token_buckets},
            "adapter_bank": {"slots": 3, "max_rank": workload.rank},
            "output_dir": str(out),
        }
        self.llm = LLM(model, **fields, **workload.engine)

    def start_job(self, rows: Path, steps: int):
        """A finetuning job of one sequence a step."""
        self.jobs += 1
        return self.llm.finetune(
            FinetuneConfig(
                name=f"job{self.jobs}",
                dataset=rows,
                format="text",
                steps=steps,
                batch_tokens=self.workload.sequence,
                train_on="all",
                max_seq_len=self.workload.sequence,
                peft=PeftConfig(r=self.workload.rank, alpha=2 * self.workload.rank),
                optimizer=OptimizerConfig(lr=1e-4),
                resume=False,
            )
        )

    def finetune(self, rows: Path, steps: int) -> float:
        """Tokens per second between the first step and the last."""
        times = self.start_job(rows, steps + 1).wait().step_times
        self.llm.unload_adapter(f"job{self.jobs}")
        return steps * self.workload.sequence / (times[-1] - times[0])

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        started = time.perf_counter()
        outputs = self.llm.generate(prompts.tolist(), self.workload.sampling)
        seconds = time.perf_counter() - started
        return sum(len(o.token_ids) for o in outputs) / seconds

    def coserve(self, rng: np.random.Generator, rows: Path, steps: int) -> dict:
        """Requests and a job together, and the same requests and job one after the other."""
        workload = self.workload
        prompts = random_tokens(rng, 2 * workload.prompts, workload.prompt).tolist()

        def serve() -> float:
            outputs = self.llm.generate(prompts, workload.sampling)
            return 1e3 * float(np.mean([o.tpot_s for o in outputs if o.tpot_s]))

        started = time.perf_counter()
        alone_ms = serve()
        job = self.start_job(rows, steps).wait()
        sequential_s = time.perf_counter() - started
        self.llm.unload_adapter(job.name)

        started = time.perf_counter()
        job = self.start_job(rows, steps)
        coserved_ms = serve()
        served_s, steps_beside = time.perf_counter() - started, job.steps
        job.wait()
        together_s = time.perf_counter() - started
        self.llm.unload_adapter(job.name)
        return {
            "sequential_s": sequential_s,
            "together_s": together_s,
            "finetune_tokens_per_s_beside_requests": steps_beside * workload.sequence / served_s,
            "tpot_ms_alone": alone_ms,
            "tpot_ms_coserved": coserved_ms,
        }


class Theirs:
    """transformers and PEFT."""

    def __init__(self, model: Path, workload: Workload):
        self.workload = workload
        self.device = torch_device()
        dtype = getattr(torch, workload.dtype)

        def load() -> Any:
            loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
            return loaded.to(self.device)

        self.base = load().eval()
        config = PeftLoraConfig(
            r=workload.rank, lora_alpha=2 * workload.rank, target_modules="all-linear"
        )
        self.peft = get_peft_model(load(), config).train()
        trained = [p for p in self.peft.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step(self, row: np.ndarray) -> None:
        """One optimizer step on one sequence."""
        tokens = torch.from_numpy(row)[None].to(self.device)
        self.peft(input_ids=tokens, labels=tokens).loss.backward()
        torch.nn.utils.clip_grad_norm_(self.peft.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def wait(self) -> None:
        """Until the device is done."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def finetune(self, rows: np.ndarray) -> float:
        """Tokens per second."""
        self.step(rows[0])
        self.wait()
        started = time.perf_counter()
        for row in rows:
            self.step(row)
        self.wait()
        return rows.size / (time.perf_counter() - started)

    def decode(self, prompts: np.ndarray) -> float:
        """Output tokens per second."""
        tokens = torch.from_numpy(prompts).to(self.device)
        started = time.perf_counter()
        with torch.no_grad():
            outputs = self.base.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=self.workload.new_tokens,
                min_new_tokens=self.workload.new_tokens,
                do_sample=False,
                pad_token_id=0,
            )
        self.wait()
        seconds = time.perf_counter() - started
        return (outputs.shape[1] - tokens.shape[1]) * len(tokens) / seconds


def compare(workload: Workload, out: Path, rounds: int, steps: int) -> dict:
    """Measure both sides in turn, then co-serving; prints each round and returns everything."""
    out.mkdir(parents=True, exist_ok=True)
    make_model(out / "model", workload)
    rng = np.random.default_rng(0)
    rows = random_tokens(rng, steps, workload.sequence)
    dataset = write_rows(out / "rows.jsonl", rows)
    ours, theirs = Ours(out / "model", out, workload), Theirs(out / "model", workload)
    ours.decode(random_tokens(rng, workload.prompts, workload.prompt))
    theirs.decode(random_tokens(rng, workload.prompts, workload.prompt))

    result: dict = {kind: {"ours": [], "theirs": []} for kind in ("finetune", "decode")}
    for i in range(rounds):
        result["finetune"]["theirs"].append(theirs.finetune(rows))
        result["finetune"]["ours"].append(ours.finetune(dataset, steps))
        prompts = random_tokens(rng, workload.prompts, workload.prompt)
        result["decode"]["theirs"].append(theirs.decode(prompts))
        result["decode"]["ours"].append(ours.decode(prompts))
        latest = {k: {s: round(v[-1], 1) for s, v in r.items()} for k, r in result.items()}
        print(f"round {i + 1}: {latest}", flush=True)
    for kind in result.values():
        ratios = [a / b for a, b in zip(kind["ours"], kind["theirs"], strict=True)]
        kind["ratio"] = median(ratios)
    result["coserving"] = ours.coserve(rng, dataset, 2 * steps)
    result["recompiles_after_warmup"] = ours.llm.engine.runner.compilations.count
    ours.llm.close()
    return result


def show(workload: Workload, result: dict, console: Console) -> None:
    """Print the result as a table."""
    table = Table(title=f"{workload.title}, medians")
    for column in ("", "transformers + PEFT", "flexllm_jax", "ours ÷ theirs", "target"):
        table.add_column(column, justify="right" if column else "left")
    for kind in ("finetune", "decode"):
        r = result[kind]
        cells = (f"{median(r['theirs']):.1f}", f"{median(r['ours']):.1f}", f"{r['ratio']:.2f}")
        target = workload.targets.get(kind)
        table.add_row(f"{kind} tokens/s", *cells, f">= {target}" if target else "")
    console.print(table)
    both = result["coserving"]
    console.print(
        f"co-serving: {both['together_s']:.1f} s together, {both['sequential_s']:.1f} s one after "
        f"the other; {both['finetune_tokens_per_s_beside_requests']:.0f} finetuning tokens/s "
        f"beside requests; TPOT {both['tpot_ms_coserved']:.1f} ms "
        f"(alone {both['tpot_ms_alone']:.1f} ms)"
    )


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
    plt.close(figure)
