//! What all ranks know, and who serves which request.

use xccl::KvConfig;

use crate::model::Shape;

/// What all ranks know.
pub struct Job {
    pub shape: Shape,
    pub prefill: usize,
    pub decode: usize,
    pub requests: u64,
    pub longest: usize,
    pub new: usize,
    /// Of a decode rank's pool.
    pub pages: usize,
}

/// Who does what: prefill ranks come first.
pub struct Roles {
    prefill: usize,
    decode: usize,
}

/// The logits of a request's new tokens.
pub struct Answer {
    pub id: u64,
    pub logits: Vec<Vec<f32>>,
}

impl Roles {
    pub fn of(job: &Job) -> Self {
        Roles { prefill: job.prefill, decode: job.decode }
    }

    pub fn prefill_of(&self, id: u64) -> usize {
        id as usize % self.prefill
    }

    pub fn decode_of(&self, id: u64) -> usize {
        self.prefill + id as usize / self.prefill % self.decode
    }
}

impl Job {
    /// The cache as it is moved.
    pub fn kv_config(&self) -> KvConfig {
        let sizes = self.shape.pages();
        let pages = sizes.pages_of(self.longest).max(1);
        KvConfig::new(sizes.layers, sizes.page_bytes()).max_pages(pages).max_requests(4)
    }
}
