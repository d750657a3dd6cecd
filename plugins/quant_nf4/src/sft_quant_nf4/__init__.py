"""Weight quantization as sft plugins: NF4 and FP4 in blocks, INT8 and INT4 by channel or group."""
