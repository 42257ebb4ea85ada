"""What stands in several scripts on purpose is identical to the letter, and no stage imports another."""
import ast
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
STAGES = ["splits", "sft", "oracle", "precompute_rewards", "align", "generate", "evaluate"]
ITS_OWN = {"main", "parse_args", "loss_and_metrics", "evaluate"}
VARIANTS = {"load_model": {"generate"}, "collate": {"sft"}, "save_model": {"align"},  # theirs are others
            "takes_mask": {"generate"},
            "fail": {"splits", "evaluate"}}  # one for the programs of one process


def definitions(stage):
    source = (ROOT / f"{stage}.py").read_text()
    return {node.name: [ast.get_source_segment(source, part) for part in [node, *node.decorator_list]]
            for node in ast.parse(source).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_copies_are_identical():
    copies = defaultdict(dict)
    for stage in STAGES:
        for name, text in definitions(stage).items():
            if name not in ITS_OWN:
                copies[name, stage in VARIANTS.get(name, ())][stage] = "\n".join(text)
    shared = {name: set(texts.values()) for name, texts in copies.items() if len(texts) > 1}
    for name in ("fail", "Rows", "encode", "pair_mask", "collate", "PairModel", "plan_steps"):
        assert (name, False) in shared
    assert [name for name, texts in shared.items() if len(texts) > 1] == []


def imports(script):
    nodes = list(ast.walk(ast.parse((ROOT / f"{script}.py").read_text())))
    return {name.name for node in nodes if isinstance(node, ast.Import) for name in node.names} | {
        node.module for node in nodes if isinstance(node, ast.ImportFrom)}


def test_stages_share_losses_alone_and_losses_needs_torch_alone():
    for stage in STAGES:
        assert not imports(stage) & set(STAGES), stage
    assert {module.split(".")[0] for module in imports("losses")} == {"torch"}
