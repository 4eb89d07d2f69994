//! What is moved, and how pages lie in a pool.

use serde::{Deserialize, Serialize};

use super::ticket::MAX_REQUESTS;
use crate::error::{Error, Result};

/// The shape of what is moved: every rank must give the same.
///
/// ```
/// // 32 layers; a page of 16 tokens with 8 heads of 128 values of two bytes, keys and values.
/// let config = xccl::KvConfig::new(32, 16 * 8 * 128 * 2 * 2);
/// assert_eq!((config.max_pages, config.max_requests), (1024, 16));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct KvConfig {
    /// Layers of the model. Where keys and values of a layer lie in two tensors, count each as a layer.
    pub layers: usize,
    /// Bytes of a page of one layer.
    pub page_bytes: usize,
    /// Most pages of one request. Default: 1024.
    pub max_pages: usize,
    /// Most requests in flight from one sender to one receiver, 1 to 256. Default: 16.
    pub max_requests: usize,
}

impl KvConfig {
    /// So many layers of pages of so many bytes.
    pub fn new(layers: usize, page_bytes: usize) -> Self {
        KvConfig { layers, page_bytes, max_pages: 1024, max_requests: 16 }
    }

    /// Most pages of one request.
    pub fn max_pages(mut self, pages: usize) -> Self {
        self.max_pages = pages;
        self
    }

    /// Most requests in flight from one sender to one receiver.
    pub fn max_requests(mut self, requests: usize) -> Self {
        self.max_requests = requests;
        self
    }

    pub(super) fn check(&self) -> Result<()> {
        let within = |option, value: usize, least: usize, most: usize| match (least..=most).contains(&value) {
            true => Ok(()),
            false => Err(Error::Config { option, value: value.to_string(), expected: format!("{least} to {most}") }),
        };
        within("KvConfig::layers", self.layers, 1, 1 << 16)?;
        within("KvConfig::page_bytes", self.page_bytes, 1, 1 << 30)?;
        within("KvConfig::max_pages", self.max_pages, 1, 1 << 24)?;
        within("KvConfig::max_requests", self.max_requests, 1, MAX_REQUESTS)
    }
}

/// Where the pages of a pool lie: page `p` of layer `l` begins at `l * layer_stride + p * page_stride` bytes from the pool's
/// beginning. Sender and receiver may have different ones.
///
/// ```
/// let config = xccl::KvConfig::new(2, 4096);
/// let by_layer = xccl::PageLayout::by_layer(&config, 100);
/// assert_eq!((by_layer.layer_stride, by_layer.page_stride), (409_600, 4096));
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PageLayout {
    /// Pages of each layer.
    pub pages: usize,
    /// Bytes from a page to the same page of the next layer.
    pub layer_stride: usize,
    /// Bytes from a page to the next one of its layer.
    pub page_stride: usize,
}

impl PageLayout {
    /// All pages of a layer side by side, layer after layer.
    pub fn by_layer(config: &KvConfig, pages: usize) -> Self {
        let layer_stride = pages.saturating_mul(config.page_bytes);
        PageLayout { pages, layer_stride, page_stride: config.page_bytes }
    }

    /// All layers of a page side by side, page after page.
    pub fn by_page(config: &KvConfig, pages: usize) -> Self {
        let page_stride = config.layers.saturating_mul(config.page_bytes);
        PageLayout { pages, layer_stride: config.page_bytes, page_stride }
    }

    /// Bytes of a pool with this layout, `None` where two pages would overlap or no memory is so large.
    pub fn bytes(&self, config: &KvConfig) -> Option<usize> {
        let PageLayout { pages, layer_stride, page_stride } = *self;
        if pages == 0 {
            return Some(0);
        }
        let layer_reach = (pages - 1).checked_mul(page_stride)?.checked_add(config.page_bytes)?;
        let page_reach = (config.layers - 1).checked_mul(layer_stride)?.checked_add(config.page_bytes)?;
        let pages_apart = pages == 1 || page_stride >= config.page_bytes;
        let layers_apart = config.layers == 1 || layer_stride >= config.page_bytes;
        let apart = pages_apart
            && layers_apart
            && (config.layers == 1 || pages == 1 || layer_stride >= layer_reach || page_stride >= page_reach);
        let bytes = (config.layers - 1).checked_mul(layer_stride)?.checked_add(layer_reach)?;
        (apart && bytes <= isize::MAX as usize && u32::try_from(pages).is_ok()).then_some(bytes)
    }

    pub(super) fn at(&self, layer: usize, page: usize) -> usize {
        layer * self.layer_stride + page * self.page_stride
    }

    /// Checks that a pool of `given` bytes holds all pages.
    pub(super) fn check(&self, config: &KvConfig, given: usize) -> Result<()> {
        let wrong = |expected: String| Error::Config { option: "PageLayout", value: format!("{self:?}"), expected };
        match self.bytes(config) {
            None => Err(wrong("strides under which no two pages overlap".to_owned())),
            Some(bytes) if bytes > given => Err(wrong(format!("at most {given} bytes, the pool's, and not {bytes}"))),
            Some(_) => Ok(()),
        }
    }
}

/// A page that is copied.
///
/// ```
/// let pair = xccl::PagePair { source: 4, destination: 0 };
/// assert_eq!(xccl::PagePair::from((4, 0)), pair);
/// ```
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PagePair {
    /// The sender's page.
    pub source: u32,
    /// The receiver's page.
    pub destination: u32,
}

impl From<(u32, u32)> for PagePair {
    fn from((source, destination): (u32, u32)) -> Self {
        PagePair { source, destination }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn pages_of_a_layout_that_is_accepted_never_overlap_and_stay_inside(
            layers in 1usize..5, page_bytes in 1usize..20, pages in 0usize..6, layer_stride in 0usize..100, page_stride in 0usize..100,
        ) {
            let config = KvConfig::new(layers, page_bytes);
            let layout = PageLayout { pages, layer_stride, page_stride };
            let starts = (0..layers).flat_map(|l| (0..pages).map(move |p| layout.at(l, p)));
            let mut starts: Vec<_> = starts.collect();
            starts.sort();
            let apart = starts.windows(2).all(|pair| pair[0] + page_bytes <= pair[1]);
            match layout.bytes(&config) {
                Some(bytes) => {
                    prop_assert!(apart);
                    prop_assert_eq!(bytes, starts.last().map_or(0, |last| last + page_bytes));
                }
                // What is refused overlaps, or interleaves layers in a way that no engine uses.
                None => prop_assert!(!apart || (layer_stride < pages * page_stride && page_stride < layers * layer_stride)),
            }
        }
    }

    #[test]
    fn sizes_beyond_all_memory_are_refused_and_not_wrapped() {
        let config = KvConfig::new(4, 1 << 20);
        for (pages, layer_stride, page_stride) in
            [(2, usize::MAX, 1 << 20), (1 << 40, 1 << 20, usize::MAX), (1 << 33, 1 << 60, 1 << 20)]
        {
            let layout = PageLayout { pages, layer_stride, page_stride };
            assert_eq!(layout.bytes(&config), None);
            assert!(matches!(layout.check(&config, usize::MAX), Err(Error::Config { .. })));
        }
        assert!(PageLayout::by_layer(&config, 4).check(&config, (16 << 20) - 1).is_err());
        assert!(PageLayout::by_layer(&config, 4).check(&config, 16 << 20).is_ok());
        for wrong in [KvConfig::new(0, 1), KvConfig::new(1, 0), config.max_pages(0), config.max_requests(257)] {
            assert!(matches!(wrong.check(), Err(Error::Config { .. })), "{wrong:?}");
        }
    }
}
