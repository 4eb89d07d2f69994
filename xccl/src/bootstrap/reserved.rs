//! Ports that were taken for ids whose rank 0 has not joined yet.

use std::net::SocketAddr;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::UniqueId;
use super::tcp::Listener;
use crate::error::{Error, Result};

/// Ids that nobody uses must not eat up the process's descriptors.
const MOST: usize = 256;

static KEPT: Mutex<Vec<([u8; 16], Listener)>> = Mutex::new(Vec::new());

fn kept() -> MutexGuard<'static, Vec<([u8; 16], Listener)>> {
    KEPT.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Takes a free port at `address`, whose own is 0.
pub(super) fn take_a_port(address: SocketAddr) -> Result<(Listener, SocketAddr)> {
    let refuse = |source| Error::CannotListen { address: address.to_string(), source };
    let listener = Listener::bind(address).map_err(refuse)?;
    let taken = listener.address().map_err(refuse)?;
    Ok((listener, taken))
}

/// Keeps the listener until rank 0 of the id with that token joins.
pub(super) fn keep(token: [u8; 16], listener: Listener) -> Result<()> {
    let mut kept = kept();
    if kept.len() >= MOST {
        let value = format!("{} ports taken and not used", kept.len());
        let expected = format!("at most {MOST}: join as rank 0 with the ids that were made with port 0");
        return Err(Error::Config { option: "address", value, expected });
    }
    kept.push((token, listener));
    Ok(())
}

/// Gives the listener that was kept for the id with that token.
pub(super) fn claim(token: &[u8; 16]) -> Option<Listener> {
    let mut kept = kept();
    let at = kept.iter().position(|(of, _)| of == token)?;
    Some(kept.swap_remove(at).1)
}

/// An id whose port is given back, unless rank 0 has claimed it, when this is dropped.
pub(crate) struct Reserved(pub(crate) UniqueId);

impl Reserved {
    /// The id, whose port stays taken until rank 0 claims it.
    pub(crate) fn keep(self) -> UniqueId {
        let id = self.0;
        std::mem::forget(self);
        id
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        drop(claim(&self.0.token()));
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    #[test]
    fn a_port_is_taken_until_it_is_claimed_or_given_back() {
        let is_taken = |id: &UniqueId| TcpListener::bind(id.address().unwrap()).is_err();
        let id = UniqueId::new_at("127.0.0.1:0".parse().unwrap()).unwrap();
        assert!(is_taken(&id));
        drop(claim(&id.token()).unwrap());
        assert!(!is_taken(&id) && claim(&id.token()).is_none());

        let reserved = Reserved(UniqueId::new_at("[::1]:0".parse().unwrap()).unwrap());
        let id = reserved.0;
        assert!(is_taken(&id));
        drop(reserved);
        assert!(!is_taken(&id));
    }
}
