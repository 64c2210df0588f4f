"""A model's features in two dimensions: which faces it considers similar."""

from collections.abc import Sequence

import numpy as np

from util.report.drawing import CHART, PALETTE, clipped, pixels

COMPONENTS = 50  # input of t-SNE, as its authors advise (section 4.2)
PERPLEXITY = 30
FEWEST = 5  # images: among fewer, neighbourhoods mean nothing
NOTE = "t-SNE: nearby points are similar; distances between groups mean little"
MARKERS = "osD^vP"  # classes differ in shape as well


def project(features: np.ndarray, seed: int = 0) -> np.ndarray:
    """(n, D) -> (n, 2) float32 by t-SNE (van der Maaten & Hinton 2008).

    Applied to the first 50 principal components and initialised with the first two; the perplexity
    is 30, or less for fewer than 91 images. Uses one thread, so that a seed always gives the same
    map. Raises ValueError for fewer than 5 images.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    n = len(features)
    if n < FEWEST:
        raise ValueError(f"{n} images: a map needs at least {FEWEST}")
    if (features == features[0]).all():
        return np.zeros((n, 2), np.float32)
    with threadpool_limits(1):
        components = min(COMPONENTS, *features.shape)
        x = PCA(components, random_state=seed, svd_solver="full").fit_transform(features)
        tsne = TSNE(perplexity=min(PERPLEXITY, (n - 1) / 3), random_state=seed, init="pca")
        return tsne.fit_transform(x.astype(np.float32))


def feature_figure(
    points: np.ndarray, labels: np.ndarray, classes: Sequence[str], title: str
) -> np.ndarray:
    """(n, 2) points, (n,) class indices -> (h, w, 3) uint8; a colour and shape per class."""
    from matplotlib import figure, rc_context

    with rc_context(CHART):
        picture = figure.Figure(figsize=(5.6, 5.6))
        axes = picture.add_axes((0, 0, 1, 1))
        size = float(np.clip(14_000 / len(points), 10, 60))
        for k, name in enumerate(classes):
            own = points[labels == k]
            if len(own):
                axes.scatter(
                    *own.T,
                    size,
                    color=PALETTE[k % len(PALETTE)],
                    marker=MARKERS[k % len(MARKERS)],
                    edgecolors="white",
                    linewidths=0.4,
                    alpha=0.85,
                    label=_label(name, len(own)),
                )
        axes.set_xticks([])
        axes.set_yticks([])
        for side in axes.spines.values():
            side.set_visible(True)
        axes.set_title(title)
        axes.set_xlabel(NOTE, fontsize=8.5, loc="left")
        columns = 2 if len(classes) <= 4 else 3
        axes.legend(
            loc="upper left", bbox_to_anchor=(-0.02, -0.045), ncols=columns, markerscale=1.4
        )
        return pixels(picture)


def _label(name: str, count: int) -> str:
    """A class in a legend; matplotlib ignores labels that begin with an underscore."""
    shown = clipped(name)
    return f"{' ' * shown.startswith('_')}{shown} ({count:,})"
