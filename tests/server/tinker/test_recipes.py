"""Recipes of tinker-cookbook, unmodified, on a tiny model and data of their own: no hub is asked.

They need tinker, and by `pip install --no-deps` tinker-cookbook (0.6.1) with what it imports: chz,
datasets, termcolor, tiktoken, blobfile, cloudpickle, aiohttp, pillow, torch, sympy, pylatexenc,
math-verify.
"""

import json
import os
import subprocess
import sys

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.server.running import RunningServer
from tests.server.tinker.speaking import ALL_MODULES

pytest.importorskip("tinker_cookbook")

NAME = "Qwen/Qwen3-8B"  # the renderer's; a folder of this name has the tokenizer
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
SPECIAL += ["<tool_call>", "</tool_call>"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, and data under the names that recipes ask a hub for."""
    place = tmp_path_factory.mktemp("recipes")
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(models.BPE(vocab=letters, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.save_pretrained(place / NAME)
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": len(tokenizer)}
    ends = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape, **ends)).save_pretrained(place / NAME)

    chats = [
        {"role": "user", "content": "say {n}"},
        {"role": "assistant", "content": "it is {n}"},
    ]
    rows = [[m | {"content": m["content"].format(n=i % 7)} for m in chats] for i in range(64)]
    for split in ("train", "test"):
        write(place / f"HuggingFaceH4/no_robots/{split}.jsonl", [{"messages": row} for row in rows])
    sums = [{"question": f"What is {i % 5}+1?", "answer": f"#### {i % 5 + 1}"} for i in range(128)]
    for split in ("train", "test"):
        write(place / f"openai/gsm8k/main/{split}.jsonl", sums)
    files = [{"split": s, "path": f"main/{s}.jsonl"} for s in ("train", "test")]
    card = json.dumps({"configs": [{"config_name": "main", "data_files": files}]})
    (place / "openai/gsm8k/README.md").write_text(f"---\n{card}\n---\n")
    return place


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def recipe(place):
    """Runs a recipe against a server; returns what it measured at each step."""
    config = {
        "model": {"path": str(place / NAME), "max_model_len": 512},
        "adapters": {"slots": 8, "max_rank": 32, "target_modules": ALL_MODULES},
        "scheduler": {"max_tokens_per_step": 256, "max_sequences": 32},
        "compile": {"token_buckets": [32, 256]},
        "finetune": {"max_tokens": 512, "unit_tokens": 256, "saved": "all"},
        "server": {"port": 0, "tinker": {"enabled": True, "model_names": [NAME]}},
        "output_dir": str(place / "out"),
    }
    with RunningServer(config) as server:
        server.wait_ready()
        env = os.environ | {"TINKER_API_KEY": "tml-test", "TINKER_BASE_URL": server.url}
        env |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}

        def run(program, log, **options):
            arguments = [f"{k}={v}" for k, v in options.items()]
            arguments += [f"log_path={place / log}", f"model_name={NAME}"]
            ran = subprocess.run(
                [sys.executable, *program, *arguments],
                env=env,
                cwd=place,
                capture_output=True,
                text=True,
                timeout=300,
            )
            assert ran.returncode == 0, ran.stderr[-3000:]
            lines = (place / log / "metrics.jsonl").read_text().splitlines()
            return [json.loads(line) for line in lines]

        yield run


def of(name):
    return ["-m", f"tinker_cookbook.recipes.{name}"]


def test_sl_loop_resumes_as_if_it_had_not_stopped(recipe, place):
    options = {"batch_size": 8, "save_every": 2, "learning_rate": 1e-3, "max_length": 256}
    whole = recipe(of("sl_loop"), "whole", max_steps=7, **options)
    losses = [row["train_mean_nll"] for row in whole]
    assert losses[-1] < losses[0] - 0.1
    recipe(of("sl_loop"), "parts", max_steps=5, **options)
    checkpoints = place / "parts" / "checkpoints.jsonl"
    kept = checkpoints.read_text().splitlines()[:-1]  # as if it had been killed before its end
    checkpoints.write_text("\n".join(kept) + "\n")
    parts = recipe(of("sl_loop"), "parts", max_steps=7, **options)
    assert [row["train_mean_nll"] for row in parts[-3:]] == pytest.approx(losses[-3:], rel=1e-6)


def test_supervised_train_learns_and_evaluates(recipe, place):
    sizes = {"batch_size": 8, "max_length": 256, "max_steps": 8, "eval_every": 4, "save_every": 4}
    rows = recipe(of("chat_sl.train"), "chat", learning_rate=1e-3, **sizes)
    losses = [row["train_mean_nll"] for row in rows if "train_mean_nll" in row]
    held_out = [row["test/nll"] for row in rows if "test/nll" in row]
    assert len(losses) == 8 and losses[-1] < losses[0] - 0.1
    assert held_out[-1] < held_out[0] - 0.1
    saved = (place / "chat" / "checkpoints.jsonl").read_text().splitlines()
    assert [json.loads(line)["name"] for line in saved] == ["000004", "final"]


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "cispo", "gspo"])
def test_rl_loop_raises_the_reward(recipe, place, loss_fn):
    """With another reward than answers that are right, which this model never gives."""
    program = place / "rl.py"
    program.write_text(
        "import chz\nfrom tinker_cookbook.recipes import rl_loop\n"
        "share = lambda text: sum(c in 'aeiou' for c in text) / max(1, len(text))\n"
        "rl_loop.get_reward = lambda text, answer: share(text)\n"
        "chz.nested_entrypoint(rl_loop.main)\n"
    )
    options = {"batch_size": 4, "group_size": 8, "max_steps": 14, "learning_rate": 1e-2}
    options |= {"save_every": 0, "max_tokens": 16, "loss_fn": loss_fn}
    rows = recipe([str(program)], f"rl_{loss_fn}", **options)
    rewards = [row["reward/total"] for row in rows if "reward/total" in row]
    assert sum(rewards[-3:]) / 3 > 3 * sum(rewards[:3]) / 3


@pytest.mark.parametrize(
    "options", [{"loss_fn": "importance_sampling"}, {"loss_fn": "ppo", "max_steps_off_policy": 2}]
)
def test_math_rl_is_on_policy(recipe, options):
    log = f"math_{options['loss_fn']}"
    sizes = {"groups_per_batch": 4, "group_size": 4, "max_steps": 2, "max_tokens": 5}
    rows = recipe(
        of("math_rl.train"), log, env="arithmetic", renderer_name="role_colon", **sizes, **options
    )
    apart = [abs(r["optim/kl_sample_train_v1"]) for r in rows if "optim/kl_sample_train_v1" in r]
    assert apart and max(apart) < 1e-5


def test_train_dpo_begins_at_log_2(recipe, place):
    pairs = [
        {
            "comparison": {
                "prompt_conversation": [{"role": "user", "content": f"say {i % 7}"}],
                "completion_A": [{"role": "assistant", "content": f"good {i % 7}"}],
                "completion_B": [{"role": "assistant", "content": f"bad {i % 7} xyz"}],
            },
            "label": "A",
        }
        for i in range(64)
    ]
    write(place / "pairs.jsonl", pairs)
    program = place / "dpo.py"
    program.write_text(
        "import sys\n"
        "from tinker_cookbook.preference import train_dpo\n"
        "from tinker_cookbook.preference.dpo_datasets import DPODatasetBuilderFromComparisons\n"
        "from tinker_cookbook.preference.preference_datasets import ComparisonBuilderFromJsonl\n"
        "from tinker_cookbook.supervised.types import ChatDatasetBuilderCommonConfig\n"
        "given = dict(a.split('=', 1) for a in sys.argv[1:])\n"
        "common = ChatDatasetBuilderCommonConfig(renderer_name='role_colon', max_length=256,\n"
        "    batch_size=8, model_name_for_tokenizer=given['model_name'])\n"
        "pairs = ComparisonBuilderFromJsonl(train_path='pairs.jsonl')\n"
        "data = DPODatasetBuilderFromComparisons(comparison_builder=pairs, common_config=common)\n"
        "train_dpo.main(train_dpo.Config(**given, recipe_name='x', renderer_name='role_colon',\n"
        "    dataset_builder=data, learning_rate=1e-3, rolling_save_every=1, eval_every=0,\n"
        "    infrequent_eval_every=0, max_steps=4))\n"
    )
    rows = recipe([str(program)], "dpo")
    assert rows[0]["dpo_loss"] == pytest.approx(0.6931, abs=1e-3)
    assert [row["accuracy"] for row in rows[1:4]] == [1, 1, 1]
