"""MMAR as pipelines: `MMARPipeline` for diffusers, `MMARTextToImagePipeline` for transformers."""
