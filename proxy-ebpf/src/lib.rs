//! The datapath: what happens to a packet, written once for both address families and for the kernel
//! as well as the host.
//!
//! Reading order is a packet's: [`packet`] (a checked view of the headers), [`datapath`] (the stories
//! `ingress`, `egress` and `socket`, and their steps). The hooks and the maps are in the binary of
//! this package, which is built for eBPF only.
//!
//! Rules: no `unsafe`, no statics and no kernel codes in this library; packets and tables come in
//! through the traits [`packet::Frame`] and [`datapath::Tables`], which inline away.
#![cfg_attr(not(any(test, feature = "testing")), no_std)]
#![forbid(unsafe_code)]
#![allow(
    clippy::cast_possible_truncation,
    reason = "offsets, lengths and ports are small; a checked cast would be a branch to verify"
)]

pub mod datapath;
pub mod packet;
#[cfg(feature = "testing")]
pub mod testing;
