"Packaging: everything but the build system comes from settings.ini, and the version from yfpo/__init__.py."
import re
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here/"settings.ini", encoding="utf-8")
cfg, extras = config["DEFAULT"], config["extras"]
version = re.search(r'__version__ = "([^"]+)"', (here/"yfpo/__init__.py").read_text()).group(1)

setup(
    version=version, description=cfg["description"], long_description=(here/"README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown", author=cfg["author"], license="Apache-2.0", keywords=cfg["keywords"].split(),
    packages=find_packages(include=["yfpo", "yfpo.*"]),
    package_data={"yfpo.data": ["texts/*", "assets/*"], "yfpo.lab": ["texts/*"]},
    install_requires=cfg["requirements"].split(),
    extras_require={name: extras[name].split() for name in extras if name not in cfg},
    entry_points={"console_scripts": cfg["console_scripts"].split(), "nbdev": ["yfpo=yfpo._modidx:d"]},
)
