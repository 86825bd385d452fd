"""Memory-efficient fine-tuning of language models with differential privacy: the support module of the notebooks.

Import the modules by name, for example `from memarc_utils.accounting import PrivacyPlan`. This file imports nothing, so
that a module costs only what it needs itself.
"""

__version__ = "0.1.0"
