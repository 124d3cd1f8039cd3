"""Building Efficient Lightweight CNN Models: two small networks, merged and fine-tuned from the top down."""
