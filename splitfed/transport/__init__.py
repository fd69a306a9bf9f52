"""The wire: tensors and adapters to messages, channels, status codes, the link over gRPC."""
