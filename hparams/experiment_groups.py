"""The settings that only experiments have: what they make and how they measure it."""

from hparams.settings import Settings, setting


class Samples(Settings):
    """Samples."""

    n_samples: int = setting(64, "how many samples", minimum=1)


class Reconstruction(Settings):
    """Reconstruction."""

    images: list[str] | None = setting(None, "image files, and folders of them, to reconstruct, "
                                       "each as its central square (none: those of the dataset, "
                                       "only those held out where it is what the run learned "
                                       "from)")


class Inpainting(Settings):
    """Inpainting."""

    image: str | None = setting(None, "image file to fill in (none: one of the dataset)")
    image_index: int = setting(0, "which image of the dataset", minimum=0)
    mask: str | None = setting(None, "image file, white where the image is to be filled in; it has "
                               "the image's size or shape, or is square, for its central square")
    box: list[int] | None = setting(None, "x0 y0 x1 y1: what is to be filled in, in pixels of the "
                                    "square that the model sees, x1 and y1 not included",
                                    minimum=0)


class Canvas(Settings):
    """Canvas."""

    shape: list[int] = setting([], "height and width of the canvas in ids", minimum=1,
                               required=True)
    canvas: str = setting("windows", "windows: average the denoiser over all windows of the size "
                          "it was trained on; native: run it on the whole canvas, which needs "
                          "--position without absolute", choices=["windows", "native"])


class SamplesToMeasure(Settings):
    """Samples to measure."""

    n_samples: int = setting(0, "how many samples are measured, exactly; the published figures "
                             "are of 50000", minimum=2, required=True)
    latents_path: str | None = setting(None, "file of ids, an integer tensor [n, N] saved by "
                                       "torch.save, to decode and measure instead of sampling")


class Features(Settings):
    """Features."""

    feature_extractor: str = setting(
        "inception", "network whose features are compared; efficientnet_lite0 is installed with "
        "its weights, the others download theirs once",
        choices=["inception", "vgg16", "clip", "dinov2", "efficientnet_lite0"],
    )
    feature_extractor_weights: str | None = setting(None, "local file of the extractor's weights")


class FID(Settings):
    """Measures beside FID."""

    kid: bool = setting(False, "also the kernel inception distance")
    kid_subset_size: int = setting(1000, "samples in each of the 100 subsets of KID", minimum=2)
    isc: bool = setting(False, "also the inception score")
    prc: bool = setting(False, "also precision and recall, with 3 neighbours")


class PRDC(Settings):
    """Precision, recall, density, coverage."""

    nearest_k: int = setting(3, "neighbour whose distance is the radius of a ball", minimum=1)
    real_feats: str | None = setting(None, ".npy file that features of real images are kept in, "
                                     "and read from where it is there")
    fake_feats: str | None = setting(None, "the same for the samples")
    fake_images_path: str | None = setting(None, "folder of images to measure instead of samples")


class ELBO(Settings):
    """Bound on the likelihood."""

    elbo_samples: int = setting(0, "times drawn for each image, spread evenly; 0 sums over all of "
                                "them", minimum=0)
    train_steps: int = setting(10000, "steps to fine-tune the generator's sigma for", minimum=1)
    steps_per_eval: int = setting(5000, "steps between evaluations on the validation set; 0 for "
                                  "one at the end", minimum=0)
    logsigma_lr: float = setting(1e-3, "learning rate of the generator's sigma", above=0)


class NearestNeighbours(Settings):
    """Nearest neighbours."""

    n_samples: int = setting(16, "how many samples", minimum=1)
    k_nearest: int = setting(10, "training images shown for each sample", minimum=1)
    spaces: list[str] = setting(["lpips", "pixels"], "lpips, which needs VGG16's weights, and "
                                "pixels, the Euclidean distance", choices=["lpips", "pixels"])


class Page(Settings):
    """Page."""

    host: str = setting("127.0.0.1", "address that the page listens on; any but this machine's own "
                        "needs a password")
    port: int = setting(7860, "port of the page", minimum=1, maximum=65535)
    password: str | None = setting(None, "what visitors have to type, with any name; the variable "
                                   "HYDRA_PASSWORD says it without showing it to other users of "
                                   "this machine")
    log_dir: str = setting("web_demo", "name of the run: its log goes to logs/NAME")
    n_samples: int = setting(16, "how many samples the page draws at first", minimum=1, maximum=64)
