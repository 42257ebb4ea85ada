#!/usr/bin/env bash
# One would have sworn that transformers reads a GGUF file's tokenizer as llama.cpp does. llama.cpp keeps
# real vocabularies with texts and the ids that it expects (in the source of llama_cpp_python 0.3.36).
# transformers 5.23.0 agrees on all 46 texts for Qwen2, Phi-3 and GPT-2; for Llama 3 it splits words that no
# merge reaches, and 588 words of the vocabulary do not come back from their own text as one token; for
# Llama 2 a text's first blank is lost (" Hello" is "Hello", also when it is decoded); Falcon's digits are
# grouped otherwise. An answer that was sampled by a llama.cpp server and is scored with the tokenizer from
# the same file has other tokens, and so another log-prob.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile --disable-pip-version-check \
    torch==2.13.0 transformers==5.23.0 gguf==0.19.0
cd "$dir"
"$dir/venv/bin/pip" download -q --disable-pip-version-check --no-deps --no-binary :all: \
    llama_cpp_python==0.3.36
tar xzf llama_cpp_python-0.3.36.tar.gz --strip-components=4 --wildcards \
    '*/vendor/llama.cpp/models/ggml-vocab-*'
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1
"$dir/venv/bin/python" - <<'PY'
from transformers import AutoTokenizer

differ = {}
for name in ("qwen2", "phi-3", "gpt-2", "llama-bpe", "llama-spm", "falcon"):
    file = f"ggml-vocab-{name}.gguf"
    tokenizer = AutoTokenizer.from_pretrained(".", gguf_file=file)
    texts = open(f"{file}.inp", encoding="utf-8", newline="").read().split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in open(f"{file}.out")]
    differ[name] = 0
    for text, theirs in zip(texts, expected):
        ours = tokenizer(text, add_special_tokens=False)["input_ids"]
        if ours != theirs:
            differ[name] += 1
            example = [text[:24], *(tokenizer.convert_ids_to_tokens(ids)[:6] for ids in (ours, theirs))]
    print(f"{name}: {differ[name]} of {len(expected)} texts differ")
    if differ[name]:
        print("   the last, {!r}: transformers {}, llama.cpp {}".format(*example))
    if name == "llama-spm":
        back = tokenizer.decode(tokenizer(" Hello", add_special_tokens=False)["input_ids"])
        print(f"   ' Hello' comes back as {back!r}")
    if name == "llama-bpe":
        words = {i: tokenizer.decode([i]) for i in tokenizer.get_vocab().values()}
        whole = {i: word for i, word in words.items() if "\N{REPLACEMENT CHARACTER}" not in word}
        ids = tokenizer(list(whole.values()), add_special_tokens=False)["input_ids"]
        lost = [whole[i] for i, now in zip(whole, ids) if now != [i]]
        print(f"   {len(lost)} words of the vocabulary do not come back as one token, as {lost[:3]}")
assert differ == {"qwen2": 0, "phi-3": 0, "gpt-2": 0, "llama-bpe": 1, "llama-spm": 15, "falcon": 9}, differ
assert back == "Hello" and len(lost) == 588, (back, len(lost))
PY
