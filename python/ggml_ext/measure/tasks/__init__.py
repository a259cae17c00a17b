"""Tasks whose answer stands somewhere in a long text: what a compressed KV cache may lose."""
