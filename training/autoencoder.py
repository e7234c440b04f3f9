"""Training of a small FLUX-type autoencoder that starts as a linear transform.

From random weights a convolutional autoencoder spends its first hours finding what a linear transform does at once.
So the convolutions outside the residual branches are trained first, alone, as one linear chain (minutes on a CPU);
then they are written into the ordinary architecture, whose residual branches start at zero, and everything is trained
together. A chain passes the final norm, SiLU and convolution unharmed because silu(x) - silu(-x) = x, with two large
constant channels in each group holding the group norm still.
"""

from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from step1x.engine.vae import VAE, ResnetBlock, VAEConfig

HOLD = 4.0  # constant channels of +-HOLD beside signals of deviation 1 hold a group's scale within some percent
LOGVAR = -6.0  # posterior deviation 0.05 beside latents of deviation 1


class LinearChain(nn.Module):
    """The autoencoder's convolutions outside its residual branches. `features` values a pixel reach conv_out."""

    def __init__(self, config: VAEConfig, features: int) -> None:
        super().__init__()
        c0, c1, c2, c3 = config.channels
        latent = config.z_channels
        down = (
            (config.in_channels, c0, 3, 1),
            (c0, c0, 3, 2),
            (c0, c1, 1, 1),
            (c1, c1, 3, 2),
            (c1, c2, 1, 1),
        )
        up = (
            (latent, c3, 3),
            (c3, c3, 3),
            (c3, c2, 1),
            (c2, c2, 3),
            (c2, c1, 1),
            (c1, c1, 3),
            (c1, features, 1),
        )
        self.down = nn.ModuleList(
            nn.Conv2d(a, b, size, stride=stride, padding=1 if stride == 1 and size == 3 else 0)
            for a, b, size, stride in (*down, (c2, latent, 3, 2))
        )
        self.up = nn.ModuleList(
            nn.Conv2d(a, b, size, padding=size // 2) for a, b, size in (*up, (features, config.in_channels, 3))
        )
        for conv in (*self.down, *self.up):
            nn.init.orthogonal_(conv.weight.view(conv.out_channels, -1))
            nn.init.zeros_(conv.bias)

    def encode(self, x: Tensor) -> Tensor:
        for conv in self.down:
            x = conv(F.pad(x, (0, 1, 0, 1)) if conv.stride[0] == 2 else x)
        return x

    def decode(self, z: Tensor) -> Tensor:
        for index, conv in enumerate(self.up):
            z = conv(F.interpolate(z, scale_factor=2.0, mode="nearest") if index in (1, 3, 5) else z)
        return z

    def fit(self, batches: Iterator[Tensor], steps: int, lr: float = 3e-3) -> float:
        """Adam on the squared error with a cosine schedule; returns the last batch's error."""
        optimizer = torch.optim.Adam(self.parameters(), lr=lr, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.05)
        error = torch.zeros(())
        for _ in range(steps):
            pictures = next(batches)
            error = F.mse_loss(self.decode(self.encode(pictures)), pictures)
            optimizer.zero_grad()
            error.backward()
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        return error.item()

    @torch.no_grad()
    def whiten(self, pictures: Tensor) -> None:
        """Latents of mean 0 and deviation 1 over `pictures`, without changing the reconstruction (inside)."""
        z = self.encode(pictures)
        centre, deviation = z.mean((0, 2, 3)), z.std((0, 2, 3))
        out, into = self.down[-1], self.up[0]
        out.weight /= deviation[:, None, None, None]
        out.bias.copy_((out.bias - centre) / deviation)
        into.bias += (into.weight * centre[None, :, None, None]).sum((1, 2, 3))
        into.weight *= deviation[None, :, None, None]

    @torch.no_grad()
    def scale_features(self, pictures: Tensor) -> None:
        """Features before conv_out get deviation 1, so that HOLD dwarfs them."""
        z = self.encode(pictures)
        for index, conv in enumerate(self.up[:-1]):
            z = conv(F.interpolate(z, scale_factor=2.0, mode="nearest") if index in (1, 3, 5) else z)
        deviation = z.std((0, 2, 3))
        self.up[-2].weight /= deviation[:, None, None, None]
        self.up[-2].bias /= deviation
        self.up[-1].weight *= deviation[None, :, None, None]


def pairs(width: int, groups: int, signals: int) -> tuple[list[int], list[int], list[int], list[int]]:
    """Channels that carry +signal, -signal, +HOLD and -HOLD, spread evenly over the groups.

    Raises ValueError when the groups are too narrow.
    """
    size, share = width // groups, -(-signals // groups)
    if size < 2 + 2 * share:
        raise ValueError(f"{groups} groups of {size} channels cannot carry {signals} signals in pairs")
    held = [group * size for group in range(groups)]
    plus = [start + 2 + 2 * slot for start in held for slot in range(share)][:signals]
    return plus, [channel + 1 for channel in plus], held, [channel + 1 for channel in held]


def _write_pairs(into: nn.Conv2d, signal: nn.Conv2d | None, norms: list[nn.GroupNorm], out: nn.Conv2d) -> None:
    """Make `into` (1x1) emit +-signals and holds, `norms` near identities, and `out` (the last reader) a difference.

    signal: the 1x1 convolution whose rows are the signals; None: the first input channels are the signals.
    """
    count = signal.out_channels if signal is not None else out.out_channels // 2
    plus, minus, held_up, held_down = pairs(into.out_channels, norms[0].num_groups, count)
    nn.init.normal_(into.weight, std=0.02)
    nn.init.zeros_(into.bias)
    for sign, channels in ((1.0, plus), (-1.0, minus)):
        into.weight[channels] = 0
        if signal is None:
            into.weight[channels, torch.arange(count), 0, 0] = sign
        else:
            into.weight[channels] = sign * signal.weight
            into.bias[channels] = sign * signal.bias
    for sign, channels in ((1.0, held_up), (-1.0, held_down)):
        into.weight[channels] = 0
        into.bias[channels] = sign * HOLD
    size, groups = into.out_channels // norms[0].num_groups, norms[0].num_groups
    scale = ((2 * HOLD**2 + 2 * count / groups) / size) ** 0.5
    for norm in norms:
        nn.init.constant_(norm.weight, scale)
        norm.weight[held_up + held_down] = 0  # they steady the norm and are seen by nothing behind it
    old = out.weight.clone()
    nn.init.zeros_(out.weight)
    for index, (up, down) in enumerate(zip(plus, minus, strict=True)):
        out.weight[:, up], out.weight[:, down] = old[:, index], -old[:, index]


@torch.no_grad()
def write_chain(chain: LinearChain, vae: VAE) -> None:
    """The chain as weights of the ordinary autoencoder, residual branches silent."""
    for module in vae.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
    encoder, decoder, latent = vae.encoder, vae.decoder, vae.config.z_channels
    for coder in (encoder, decoder):
        nn.init.zeros_(coder.mid.attn_1.proj_out.weight)
        nn.init.zeros_(coder.mid.attn_1.proj_out.bias)
    down = (
        encoder.conv_in,
        encoder.down[0].downsample.conv,
        encoder.down[1].block[0].nin_shortcut,
        encoder.down[1].downsample.conv,
        encoder.down[2].block[0].nin_shortcut,
    )
    up = (
        decoder.conv_in,
        decoder.up[3].upsample.conv,
        decoder.up[2].block[0].nin_shortcut,
        decoder.up[2].upsample.conv,
        decoder.up[1].block[0].nin_shortcut,
        decoder.up[1].upsample.conv,
    )
    for ours, theirs in (*zip(down, chain.down, strict=False), *zip(up, chain.up, strict=False)):
        ours.load_state_dict(theirs.state_dict())
    last = encoder.down[2].downsample.conv
    last.weight[:latent], last.bias[:latent] = chain.down[-1].weight, chain.down[-1].bias
    nn.init.zeros_(encoder.conv_out.weight)
    encoder.conv_out.weight[range(latent), range(latent), 1, 1] = 1
    encoder.conv_out.bias.zero_()
    mid = encoder.mid
    norms = [block.norm1 for block in (*encoder.down[3].block[1:], mid.block_1, mid.block_2)]
    norms = [*norms, mid.attn_1.norm, encoder.norm_out]
    _write_pairs(encoder.down[3].block[0].nin_shortcut, None, norms, encoder.conv_out)
    encoder.conv_out.weight[latent:] = 0
    encoder.conv_out.bias[latent:] = LOGVAR
    reader, features = chain.up[-1], chain.up[-2]
    decoder.conv_out.weight[:, : features.out_channels] = reader.weight
    decoder.conv_out.bias.copy_(reader.bias)
    norms = [*(block.norm1 for block in decoder.up[0].block[1:]), decoder.norm_out]
    _write_pairs(decoder.up[0].block[0].nin_shortcut, features, norms, decoder.conv_out)


def start_linear(vae: VAE, batches: Iterator[Tensor], steps: int) -> float:
    """Fit the linear chain on `batches` of pictures (batch, 3, h, w) in [-1, 1] and write it into `vae`.

    Returns the chain's last squared error. Needs four levels of growing widths.
    """
    groups = vae.config.groups
    features = groups * ((vae.config.channels[0] // groups - 2) // 2)
    device = vae.encoder.conv_in.weight.device
    chain = LinearChain(vae.config, features).to(device)
    error = chain.fit(batches, steps)
    pictures = next(batches)
    chain.whiten(pictures)
    chain.scale_features(pictures)
    write_chain(chain, vae)
    return error


@torch.no_grad()
def whiten(vae: VAE, batches: Iterable[Tensor]) -> None:
    """Make every latent channel mean 0 and deviation 1 over batches of pictures, keeping the reconstruction.

    The shift is exact inside the picture; conv_in's zero padding makes border cells see it through fewer taps, so
    the leash of `loss` keeps the means small.
    """
    means = [vae.encoder(pictures).chunk(2, dim=1)[0].movedim(1, 0).flatten(1) for pictures in batches]
    latents = torch.cat(means, dim=1)
    centre, deviation = latents.mean(1), latents.std(1)
    count = len(centre)
    out, into = vae.encoder.conv_out, vae.decoder.conv_in
    out.weight[:count] /= deviation[:, None, None, None]
    out.bias[:count] = (out.bias[:count] - centre) / deviation
    into.bias += (into.weight * centre[None, :, None, None]).sum((1, 2, 3))
    into.weight *= deviation[None, :, None, None]


def loss(vae: VAE, pictures: Tensor, latent_noise: float) -> tuple[Tensor, Tensor]:
    """Reconstruction loss with a leash that keeps latents near mean 0 and deviation 1; and the squared error.

    The decoder sees latents with noise of deviation `latent_noise`: those of the DiT are never exact.
    """
    mean, logvar = vae.encoder(pictures).chunk(2, dim=1)
    decoded = vae.decoder(mean + latent_noise * torch.randn_like(mean))
    error = F.mse_loss(decoded, pictures)
    leash = mean.mean((0, 2, 3)).square().mean() + mean.var((0, 2, 3)).clamp_min(1e-4).log().square().mean()
    return error + 1e-4 * (leash + (logvar - LOGVAR).square().mean()), error


@torch.no_grad()
def channel_weights(vae: VAE, pictures: Tensor, generator: torch.Generator) -> Tensor:
    """How much an error in each latent channel matters to the pixels: (channels,), mean 1.

    The squared pixel response to a small noise in one channel, to the power 3/4. Whitened channels all have deviation
    1, but a few of them carry colour and shade; the plain mean over channels would learn the other dozen first.
    """
    latents = vae.encode(pictures)
    plain = vae.decode(latents)
    noise = 0.1 * torch.randn(latents.shape[0], *latents.shape[2:], generator=generator).to(latents.device)
    response = []
    for channel in range(latents.shape[1]):
        moved = latents.clone()
        moved[:, channel] += noise
        response.append((vae.decode(moved) - plain).square().mean())
    weights = torch.stack(response) ** 0.75
    return weights / weights.mean()
