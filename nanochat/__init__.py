"""nanochat as a library: train, measure and serve a small chat model. docs/architecture.md says what each module decides."""
