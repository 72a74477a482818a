"""Text in and out: vocabulary, chat format, tool calls, streaming. Knows no tensors."""
