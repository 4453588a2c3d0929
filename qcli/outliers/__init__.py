"""Outlier features (LLM.int8(), arXiv:2208.07339, section 4): where they are, what they do, what each method would cost."""
