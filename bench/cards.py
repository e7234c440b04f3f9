"""The cards that the choice of a profile is held to, as torch reports them; none of them is needed to run this."""

from collections.abc import Sequence

from step1x.engine.card import Card

__all__ = ["CARDS", "Card"]

MIB = 1 << 20

# Memory as PyTorch prints it, in whole MiB: what users of these cards published. Drivers differ by some hundred MiB.
CARDS: dict[str, Card] = {
    "T4": Card("Tesla T4", 15_095 * MIB, (7, 5), 40),
    "V100": Card("Tesla V100-SXM2-16GB", 16_160 * MIB, (7, 0), 80),
    "A10G": Card("NVIDIA A10G", 22_587 * MIB, (8, 6), 80),
    "RTX 3090": Card("NVIDIA GeForce RTX 3090", 24_259 * MIB, (8, 6), 82),
    "RTX A6000": Card("NVIDIA RTX A6000", 48_676 * MIB, (8, 6), 84),
    "A100 40GB": Card("NVIDIA A100-SXM4-40GB", 40_326 * MIB, (8, 0), 108),
    "A100 80GB": Card("NVIDIA A100-SXM4-80GB", 81_050 * MIB, (8, 0), 108),
    "L4": Card("NVIDIA L4", 22_563 * MIB, (8, 9), 58),
    "L40S": Card("NVIDIA L40S", 45_589 * MIB, (8, 9), 142),
    "RTX 4090": Card("NVIDIA GeForce RTX 4090", 24_209 * MIB, (8, 9), 128),
    "RTX 5090": Card("NVIDIA GeForce RTX 5090", 32_110 * MIB, (12, 0), 170),
    "RTX 4080": Card("NVIDIA GeForce RTX 4080", 16_049 * MIB, (8, 9), 76),
    "H100": Card("NVIDIA H100 80GB HBM3", 81_082 * MIB, (9, 0), 132),
    "H200": Card("NVIDIA H200", 143_156 * MIB, (9, 0), 132),
    "B200": Card("NVIDIA B200", 182_631 * MIB, (10, 0), 148),
}


HOST_GB = 64  # of free host memory, in the tables
NOTE = """# What would be used on which card

**Plans, not measurements**: made from the sizes of the released v1.1 at 1024 x 1024, what NVIDIA says of its cards,
and {host} GB of free host memory; nothing here ran on these cards. `step1x-engine doctor` says the same of the machine
it runs on, after its kernels have been checked there. Written by `python -m step1x.bench.cards > docs/cards.md`; a
test holds it to the code.
"""
CHOICE = """
## Chosen by `--profile auto`

GB are 1e9 bytes, as PyTorch reports a card. Kernels: of how many operations ours run if they pass their check;
attention: of keys that carry a bias, as collapsed padding does; products: of rows that are quantized as they come, if
torchao is installed.

| card | GB | capability | profile | planned peak, GB | kernels | attention | products |
|---|---|---|---|---|---|---|---|
"""
EVERY = """
## Every profile

Planned peak in GB at the profile's own batch. "slow": it fits, but blocks are streamed, weights are dequantized in
every step, or bfloat16 products run at half rate, as they do on GeForce cards. "memory": it takes more than the card
or the profile's budget has; "host": more host memory than is free; "sm": the card's compute capability is too low.

"""


def document() -> str:
    """docs/cards.md."""
    import torch

    from step1x.engine.auto_profile import gpu_profiles
    from step1x.engine.uses import uses
    from step1x.kernels.launch import assumed

    host, device, rows = HOST_GB * 10**9, torch.device("cuda", 0), []
    for label, card in CARDS.items():
        with assumed(10 * card.capability[0] + card.capability[1]):
            found = uses(device, card, host, None)
        ours = sum(not reason for reason in found.kernels.values())
        peak = f"{found.peak / 1e9:.1f}" if found.peak else "-"
        cells = (label, f"{card.total_memory / 1e9:.1f}", str(card.compute), found.profile.what or "none fits", peak)
        rows.append((*cells, f"{ours} of {len(found.kernels)}", found.attention.what, found.products.what))
    names = [one.name for one in gpu_profiles()]
    table = [("card", *names), ("---",) * (1 + len(names)), *_every(host)]
    return NOTE.format(host=HOST_GB) + CHOICE + _lines(rows) + EVERY + _lines(table)


def _every(host: int) -> list[tuple[str, ...]]:
    from step1x.engine.auto_profile import USUAL, Fit, fit, gpu_profiles
    from step1x.engine.engine_config import model_sizes

    def word(found: Fit, card: Card, capability: float) -> str:
        if card.compute < capability:
            return "sm"
        if not found.fits:
            return "host" if found.reason.startswith("pins") else "memory"
        return f"{found.peak / 1e9:.1f}" + ("" if found.fast else " slow")

    sizes = model_sizes(USUAL)
    return [
        (label, *(word(fit(sizes, one, card, host, small=False), card, one.capability) for one in gpu_profiles()))
        for label, card in CARDS.items()
    ]


def _lines(rows: Sequence[tuple[str, ...]]) -> str:
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


if __name__ == "__main__":
    print(document(), end="")
