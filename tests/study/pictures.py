"""Draws the study's pictures from results.json: python tests/study/pictures.py

../pictures/degeneration.png: win rates over training steps on the toy task, with their intervals.
frontier.png: true reward over KL to the start on the pretrained LM, a point a seed.
"""
import json
from pathlib import Path

import matplotlib.pyplot as plt

HERE = Path(__file__).parent
RECOMMENDED = "DRDO (log ratio, mean p_w, standardised Oracle)"
STEPS = {100: "noisy_lc_le", 300: "steps_300", 1000: "steps_1000"}
STYLES = {  # colour, marker, line
    "start": ("black", "*", "-"),
    "SFT on winners": ("C7", "p", ":"),
    "DPO": ("C3", "o", "-"),
    "DPO + NLL": ("C2", "^", "--"),
    "IPO": ("C8", "v", ":"),
    "e-DPO": ("C5", "X", "-."),
    "e-DPO (Oracle)": ("C1", "D", "-."),
    "DRDO (head)": ("C4", "s", ":"),
    RECOMMENDED: ("C0", "P", "-")}
CURVES = ["DPO", "DPO + NLL", "e-DPO (Oracle)", "DRDO (head)", RECOMMENDED]


def draw_degeneration(results, path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.2), layout="constrained", sharey=True)
    for panel, domain in zip(panels, ("posts", "articles")):
        panel.axhline(0.5, color="black", linewidth=1, label="level with SFT, from which all start")
        for method in CURVES:
            color, marker, line = STYLES[method]
            rates = [results[setting][method][f"against SFT/{domain}"] for setting in STEPS.values()]
            mean, low, high = zip(*rates)
            panel.fill_between([*STEPS], low, high, facecolor=color, edgecolor=color, alpha=0.15)
            panel.plot([*STEPS], mean, color=color, marker=marker, linestyle=line, markersize=8, label=method)
        panel.set(xscale="log", xlabel="training steps of 24 pairs")
        panel.set_xticks(list(STEPS), list(STEPS))
        panel.minorticks_off()
    panels[0].set(title="posts: in domain", ylabel="win rate against SFT, by the true reward")
    panels[1].set(title="articles: out of domain")
    figure.suptitle("Toy task, 40% of the labels wrong. Band: 95% interval over five seeds")
    save(figure, panels[0], path)


def draw_frontier(results, path):
    figure, panels = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained", sharey=True)
    titles = {"clean_all": "clean labels, D_all", "noisy_lc_le": "40% of the labels wrong, D_lc,le"}
    for panel, (setting, title) in zip(panels, titles.items()):
        for method, (color, marker, _) in STYLES.items():
            by_seed = results[setting][method]["by_seed"]
            kl = by_seed["KL"]
            reward = by_seed["true at T = 1"]
            mean = sum(kl) / len(kl), sum(reward) / len(reward)
            panel.scatter(*mean, color=color, marker=marker, s=190, edgecolor="black", label=method)
            panel.scatter(kl, reward, color=color, marker=marker, s=55, edgecolor="white", linewidth=0.5,
                          zorder=3)
        panel.set(title=title, xlabel="KL to the start, nats an answer (T = 1)")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("true reward of an answer (T = 1)")
    figure.suptitle("SmolLM2-135M-Instruct. Small: a seed. Large: the mean of three")
    save(figure, panels[0], path)


def save(figure, panel, path):
    figure.legend(*panel.get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=100)
    print(f"wrote {path}")


if __name__ == "__main__":
    figures = json.loads((HERE / "results.json").read_text())
    draw_degeneration(figures["lab"], HERE.parent / "pictures" / "degeneration.png")
    draw_frontier(figures["real"], HERE / "frontier.png")
