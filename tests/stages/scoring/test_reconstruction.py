"""PSNR and SSIM against closed forms, torchmetrics and a SSIM written on scipy's filters."""

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional.image import peak_signal_noise_ratio

from rae.stages.scoring.reconstruction import MAX_PSNR_DB, psnr_db, ssim
from rae.store.errors import ConfigError, StaleInput


def noisy_pair(count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Smooth pictures, and the same with more noise from one to the next."""
    rng = np.random.default_rng(0)
    smooth = gaussian_filter(rng.uniform(0, 255, (count, size, size, 3)), (0, 3, 3, 0)) * 4 - 382
    reference = smooth.clip(0, 255).astype(np.uint8)
    noise = rng.standard_normal(reference.shape) * np.arange(1, count + 1)[:, None, None, None] * 3
    return reference, (reference + noise).clip(0, 255).astype(np.uint8)


def ssim_by_scipy(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, equation 13, one channel after another, the image mirrored at its borders."""
    values = []
    for x, y in zip((a / 255.0).transpose(0, 3, 1, 2), (b / 255.0).transpose(0, 3, 1, 2), strict=True):
        for p, q in zip(x, y, strict=True):
            mean_p, mean_q, pp, qq, pq = (
                gaussian_filter(plane, 1.5, radius=5, mode="mirror") for plane in (p, q, p * p, q * q, p * q)
            )
            c1, c2 = 0.01**2, 0.03**2
            luminance = (2 * mean_p * mean_q + c1) / (mean_p**2 + mean_q**2 + c1)
            structure = (2 * (pq - mean_p * mean_q) + c2) / (pp - mean_p**2 + qq - mean_q**2 + c2)
            values.append((luminance * structure).mean())
    return float(np.mean(values))


def test_psnr_of_a_known_error() -> None:
    reference = np.full((3, 8, 8, 3), 100, np.uint8)
    assert psnr_db(reference, reference + np.uint8(51)) == pytest.approx(20 * np.log10(5))


def test_psnr_is_the_mean_of_the_images_own() -> None:
    reference, other = noisy_pair(40, 16)
    own = [
        peak_signal_noise_ratio(torch.from_numpy(b / 255.0), torch.from_numpy(a / 255.0), data_range=1.0).item()
        for a, b in zip(reference, other, strict=True)
    ]
    assert psnr_db(reference, other) == pytest.approx(np.mean(own), rel=1e-6), (
        "torchmetrics rounds its logarithms to float32"
    )
    assert np.ptp(own) > 3, "not the same as the PSNR of the mean error"


def test_psnr_of_identical_images_is_capped() -> None:
    reference = np.zeros((2, 8, 8, 3), np.uint8)
    assert psnr_db(reference, reference) == MAX_PSNR_DB
    other = reference.copy()
    other[1] += 51
    assert psnr_db(reference, other) == pytest.approx((MAX_PSNR_DB + 20 * np.log10(5)) / 2)


def test_ssim_agrees_with_scipy() -> None:
    reference, other = noisy_pair(35, 24)
    expected = ssim_by_scipy(reference, other)
    assert 0.2 < expected < 0.9
    assert ssim(reference, other) == pytest.approx(expected, abs=1e-5)
    assert ssim(reference, reference) == pytest.approx(1.0, abs=1e-5)


def test_what_cannot_be_compared_is_refused() -> None:
    reference = np.zeros((2, 16, 16, 3), np.uint8)
    with pytest.raises(StaleInput, match="shape"):
        psnr_db(reference, reference[:1])
    with pytest.raises(ConfigError, match="no image"):
        psnr_db(reference[:0], reference[:0])
    with pytest.raises(ConfigError, match="16x5"):
        ssim(reference[:, :, :5], reference[:, :, :5])
