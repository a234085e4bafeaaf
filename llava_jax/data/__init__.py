"""Records in LLaVA's format -> conversations -> token rows -> packed batches."""
