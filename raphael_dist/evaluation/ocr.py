"""OCR engines: PP-OCRv6 with the weights of the package rapidocr, tesseract, or a function of the user."""

import importlib
import importlib.util
import itertools
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

import numpy as np
from PIL import Image

from raphael_dist.errors import UserError
from raphael_dist.evaluation.lettering import normalise_text

# From an image, uint8 [H, W, 3], to the text in it.
Reader = Callable[[np.ndarray], str]
WEIGHTS = "PP-OCRv6_rec_small.onnx"
# Pixels: height of the input of PP-OCRv6, and the width to which shorter lines are padded, as in the network's training.
LINE_HW = (48, 320)
TESSERACT_SIDE = 400  # pixels to which small images are enlarged, since tesseract expects the resolution of scans


def load_reader(spec: str, alphabet: Collection[str]) -> Reader:
    """Return an OCR engine as a function from an image, uint8 [H, W, 3], to the text in it.

    Args:
        spec: value of the option --ocr: "rapidocr", "tesseract", or "module:function" for a function of the user.
        alphabet: characters that can occur in the images; rapidocr is restricted to them.

    Raises:
        UserError: the engine is not installed, or "module:function" cannot be imported or is not a function.
    """
    if spec == "rapidocr":
        return LineReader(alphabet)
    if spec == "tesseract":
        if shutil.which("tesseract") is None:
            raise UserError(
                "--ocr=tesseract requires tesseract, but it is not installed. Install it (Debian: tesseract-ocr) or leave "
                "out --ocr."
            )
        return read_with_tesseract
    module, _, name = spec.partition(":")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"--ocr={spec} must be rapidocr, tesseract or MODULE:FUNCTION of an installed Python module, but {spec} cannot "
            f"be imported ({error}). Use --ocr rapidocr, or e.g. --ocr my_ocr:read_text."
        ) from None
    if not callable(function):
        raise UserError(
            f"--ocr={spec} must name a function (MODULE:FUNCTION) that turns an image's pixels into text, but {name} is not "
            "a function. Name a function, e.g. --ocr my_ocr:read_text, or use rapidocr or tesseract."
        )
    return lambda pixels: str(function(pixels))


class LineReader:
    """The OCR network PP-OCRv6, without detection of lines: it reads a whole image as one line of text.

    Only the weights of the package rapidocr are used and not its code, because the code downloads missing weights.
    """

    def __init__(self, alphabet: Collection[str]):
        """Load the weights. `alphabet`: the only characters that the network may return.

        Raises UserError if the packages rapidocr or onnxruntime are missing.
        """
        package = importlib.util.find_spec("rapidocr")
        path = Path(next(iter((package and package.submodule_search_locations) or [""]))) / "models" / WEIGHTS
        try:
            import onnxruntime
        except ImportError:
            onnxruntime = None
        if onnxruntime is None or not path.is_file():
            raise UserError(
                "--ocr=rapidocr requires rapidocr 3.10 or later and onnxruntime, but "
                f"{'onnxruntime' if onnxruntime is None else WEIGHTS + ' of rapidocr'} is not installed. "
                'Run `pip install "raphael_dist[eval]"` or give --ocr tesseract.'
            )
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1  # other ranks of a launcher use the other cores
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        (network_input,) = self._session.get_inputs()
        self._input = network_input.name
        # Class 0 is CTC's blank, the last one a space.
        self._characters = ["", *self._session.get_modelmeta().custom_metadata_map["character"].splitlines(), " "]
        self._allowed = np.array([not character or character in alphabet for character in self._characters])

    def __call__(self, pixels_HW3: np.ndarray) -> str:
        """Return the text in an image, uint8 [H, W, 3].

        The network returns a score of each character at T positions from left to right. The scores are decoded as usual for
        CTC: take the allowed character with the highest score at each position, merge repetitions, and remove blanks.
        """
        scores_TC = self._session.run(None, {self._input: line_input(pixels_HW3)[None]})[0][0]
        best_T = np.where(self._allowed, scores_TC, -np.inf).argmax(axis=1)
        return "".join(self._characters[best] for best, _ in itertools.groupby(best_T))


def line_input(pixels_HW3: np.ndarray) -> np.ndarray:
    """Convert an image to the input of PP-OCRv6.

    The image is resized to the height of 48 pixels; a narrow one is padded with grey on the right. Channels are blue, green,
    red.

    Args:
        pixels_HW3: the image, uint8 [H, W, 3].

    Returns:
        float32 [3, 48, W'] in -1..1, where W' is at least 320.
    """
    height, least_width = LINE_HW
    width = max(1, round(height * pixels_HW3.shape[1] / pixels_HW3.shape[0]))
    resized = Image.fromarray(pixels_HW3).resize((width, height), Image.Resampling.BICUBIC)
    line = np.zeros((3, height, max(width, least_width)), np.float32)
    line[:, :, :width] = np.asarray(resized, np.float32)[:, :, ::-1].transpose(2, 0, 1) / 127.5 - 1
    return line


def read_with_tesseract(pixels_HW3: np.ndarray) -> str:
    """Return the text that tesseract reads in an image; "" if it reads no letter or digit.

    Tesseract looks for a line of text and, if there is none, for a single character. It reads the image and its negative,
    since it expects dark text on light ground. The result with more letters and digits is returned.

    Args:
        pixels_HW3: the image, uint8 [H, W, 3].
    """
    image = Image.fromarray(pixels_HW3).convert("L")
    scale = max(1, TESSERACT_SIDE // max(image.size))
    image = image.resize((image.width * scale, image.height * scale), Image.Resampling.LANCZOS)
    inverted = Image.fromarray(255 - np.asarray(image))
    for mode in ("7", "10"):  # tesseract's page segmentation: a line, a character
        best = max((_run_tesseract(i, mode) for i in (image, inverted)), key=lambda text: len(normalise_text(text)))
        if normalise_text(best):
            return best
    return ""


def _run_tesseract(image: Image.Image, mode: str) -> str:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "image.png"
        image.save(path)
        command = ["tesseract", str(path), "stdout", "--psm", mode, "--dpi", "300"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    if done.returncode:
        raise UserError(
            f"--ocr=tesseract failed with this message: {(done.stderr.strip().splitlines() or ['none'])[0]}. Install "
            "tesseract again (Debian: tesseract-ocr), or use --ocr rapidocr."
        )
    return done.stdout.strip()
