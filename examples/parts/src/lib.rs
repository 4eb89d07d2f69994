//! What XCCL's examples have in common: how they start their ranks, the parts of their models, and how tests run them.
//!
//! The models add in one fixed order, so that the same rows and weights give the same bits in whichever process they are computed.

pub mod arithmetic;
pub mod attention;
pub mod cache;
pub mod expert;
pub mod launch;
pub mod program;
