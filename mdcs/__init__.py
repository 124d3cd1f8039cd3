"""MDCS (Zhao et al., ICCV 2023): long-tailed recognition with diverse experts and consistency self-distillation."""
