//! The paged cache of keys and values, in private memory or in memory that other ranks write.

use std::sync::Arc;

use anyhow::Result;
use xccl::{PageLayout, SharedBuffer};

/// Sizes of a cache.
#[derive(Clone, Copy, Debug)]
pub struct Pages {
    /// Layers of the model.
    pub layers: usize,
    /// Tokens of a page.
    pub page_tokens: usize,
    /// Elements for one token and layer: a key, then a value.
    pub token_values: usize,
}

impl Pages {
    /// Bytes for one token and layer.
    pub fn token_bytes(&self) -> usize {
        self.token_values * size_of::<f32>()
    }

    /// Bytes of one page of one layer.
    pub fn page_bytes(&self) -> usize {
        self.page_tokens * self.token_bytes()
    }

    /// Pages that so many tokens take.
    pub fn pages_of(&self, tokens: usize) -> usize {
        tokens.div_ceil(self.page_tokens)
    }
}

/// Where keys and values are kept, by layer, page, and token of the page.
pub trait Cache {
    /// Keeps the key and value of one token.
    fn store(&mut self, layer: usize, page: u32, token: usize, values: &[f32]) -> Result<()>;
    /// Gives the first tokens of a page.
    fn load(&self, layer: usize, page: u32, into: &mut [f32]) -> Result<()>;
}

/// A cache in private memory: layer after layer, page after page.
pub struct Private {
    values: Vec<f32>,
    pages: usize,
    sizes: Pages,
}

impl Private {
    /// One with so many pages of each layer.
    pub fn new(sizes: Pages, pages: usize) -> Self {
        let values = vec![0.0; sizes.layers * pages * sizes.page_tokens * sizes.token_values];
        Private { values, pages, sizes }
    }

    fn at(&self, layer: usize, page: u32) -> usize {
        (layer * self.pages + page as usize) * self.sizes.page_tokens * self.sizes.token_values
    }

    /// All of it, as [`PageLayout::by_layer`] says.
    pub fn as_bytes(&self) -> &[u8] {
        bytemuck::cast_slice(&self.values)
    }
}

impl Cache for Private {
    fn store(&mut self, layer: usize, page: u32, token: usize, values: &[f32]) -> Result<()> {
        let at = self.at(layer, page) + token * self.sizes.token_values;
        self.values[at..at + values.len()].copy_from_slice(values);
        Ok(())
    }

    fn load(&self, layer: usize, page: u32, into: &mut [f32]) -> Result<()> {
        let at = self.at(layer, page);
        into.copy_from_slice(&self.values[at..at + into.len()]);
        Ok(())
    }
}

/// A cache in memory that prefill ranks write.
pub struct Pool {
    /// The memory.
    pub memory: Arc<SharedBuffer>,
    /// Where its pages lie.
    pub layout: PageLayout,
    /// How large they are.
    pub sizes: Pages,
}

impl Pool {
    fn at(&self, layer: usize, page: u32) -> usize {
        layer * self.layout.layer_stride + page as usize * self.layout.page_stride
    }
}

impl Cache for Pool {
    fn store(&mut self, layer: usize, page: u32, token: usize, values: &[f32]) -> Result<()> {
        let at = self.at(layer, page) + token * self.sizes.token_bytes();
        Ok(self.memory.write(at, bytemuck::cast_slice(values))?)
    }

    fn load(&self, layer: usize, page: u32, into: &mut [f32]) -> Result<()> {
        Ok(self.memory.read(self.at(layer, page), bytemuck::cast_slice_mut(into))?)
    }
}
