"""Other programs take the policy that align.py --loss drdo writes. llama.cpp's package `gguf` has a place for
every tensor. `transformers serve` answers a chat request."""
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import gguf
import pytest
import torch
from conftest import call, free_port, save_rewards
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, Phi3Config, Qwen2Config

import toy

SHAPE = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)
CONFIGS = {"LLAMA": LlamaConfig, "PHI3": Phi3Config, "QWEN2": Qwen2Config}


@pytest.fixture(scope="module")
def drdo(tmp_path_factory):
    """{architecture: the folder of a policy of DRDO (head)}, of tiny random models, one step each."""
    home = tmp_path_factory.mktemp("serving")
    tokenizer = toy.make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    toy.write_jsonl(home / "pairs.jsonl", toy.make_pairs(8, 1))
    save_rewards(home / "rewards.pt", home / "pairs.jsonl", torch.randn(1, 8, 2))
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "eos_token_id", "bos_token_id")}
    folders = {}
    for name, config in CONFIGS.items():
        model = AutoModelForCausalLM.from_config(config(vocab_size=len(tokenizer), **SHAPE, **ids))
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
        folders[name] = home / f"{name}.drdo"
        call("align.py", "--loss", "drdo", "--data", home / "pairs.jsonl", "--eval_data", "",
             "--oracle_rewards", home / "rewards.pt", "--batch_size", 8, "--max_steps", 1,
             "--model", home / name, "--out", folders[name])
    return folders


def test_every_tensor_has_a_place_in_llama_cpp(drdo):
    for name, folder in drdo.items():
        places = gguf.get_tensor_name_map(getattr(gguf.MODEL_ARCH, name), SHAPE["num_hidden_layers"])
        place = lambda tensor: places.get_name(tensor, try_suffixes=(".weight", ".bias"))
        tensors = load_file(folder / "model.safetensors")
        assert len(tensors) > 10 and (folder / "score.safetensors").exists()
        assert [tensor for tensor in tensors if place(tensor) is None] == []
        assert place("score.weight") is None  # why the head lies beside it


def test_transformers_serve_answers(drdo):
    port, model = str(free_port()), str(drdo["LLAMA"])
    serve = [Path(sys.executable).parent / "transformers", "serve", model, "--port", port, "--device", "cpu"]
    server = subprocess.Popen(serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        body = {"model": model, "messages": [{"role": "user", "content": "i lost my key ."}], "max_tokens": 5}
        url = f"http://127.0.0.1:{port}/v1/chat/completions"
        request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
        for _ in range(60):
            try:
                answer = json.load(urllib.request.urlopen(request, timeout=60))
                break
            except urllib.error.URLError:  # not up yet
                assert server.poll() is None
                time.sleep(1)
        assert answer["choices"][0]["message"]["role"] == "assistant"
        assert answer["usage"]["completion_tokens"] > 0
    finally:
        server.terminate()
        server.wait(30)
