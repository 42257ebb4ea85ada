#!/usr/bin/env bash
# One would have sworn that a saved tokenizer is tokenizer.json and tokenizer_config.json. In transformers
# 5.23.0 AutoTokenizer also asks config.json, the model's: its model_type picks a class that puts its own
# splitting rule in the place of the one in tokenizer.json. A tokenizer with a rule of its own (here digits
# in threes, as Llama 3 has it) gives one set of ids after save_pretrained, and another once a Qwen2 model
# is saved in the same folder: digits one by one, and a token more, <|endoftext|>, past the end of the
# vocabulary. Decoding still gives the text back and nothing warns, so a model is trained on some tokens and
# served on others. A Llama config.json leaves the ids alone, and PreTrainedTokenizerFast.from_pretrained
# reads what was saved.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check torch==2.13.0 transformers==5.23.0
cd "$dir"
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

raw = Tokenizer(models.BPE())
raw.pre_tokenizer = pre_tokenizers.Sequence([
    pre_tokenizers.Split(Regex(r"\p{N}{1,3}|[^\s\p{N}]+|\s+"), "isolated"),
    pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
raw.decoder = decoders.ByteLevel()
raw.train_from_iterator(["room 12345 of 6789", "a sum of 44 and 4444"] * 50, trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<eos>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False))
text = "a sum of 4444"
tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", pad_token="<eos>")
tokens = {"before saving": tokenizer.tokenize(text)}
for config in (None, LlamaConfig, Qwen2Config):
    name = config.model_type if config else "none"
    tokenizer.save_pretrained(name)
    if config:
        config().save_pretrained(name)  # what model.save_pretrained writes beside the weights
    loaded = AutoTokenizer.from_pretrained(name)
    tokens[name] = loaded.tokenize(text)
    print(f"config.json: {name}; {type(loaded).__name__}: {tokens[name]}")
    added = set(loaded.get_vocab()) - set(tokenizer.get_vocab())
    assert added == ({"<|endoftext|>"} if name == "qwen2" else set())
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert PreTrainedTokenizerFast.from_pretrained(name).tokenize(text) == tokens["before saving"]
print("before saving:", tokens["before saving"])
assert tokens["none"] == tokens["llama"] == tokens["before saving"] and "444" in tokens["none"]
assert tokens["qwen2"][-4:] == ["4", "4", "4", "4"], tokens
PY
