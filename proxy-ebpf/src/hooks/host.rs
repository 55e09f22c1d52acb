//! Sockets of the host that a packet is on.

use aya_ebpf::bindings::{bpf_sock, bpf_sock_tuple};
use aya_ebpf::helpers::{bpf_sk_lookup_udp, bpf_sk_release, bpf_skc_lookup_tcp};
use aya_ebpf::programs::TcContext;
use proxy_common::tables::FlowKey;
use proxy_common::{Family, proto};

/// The network namespace of the packet's link.
const OWN_NAMESPACE: u64 = u64::MAX;
/// The state of a TCP socket that listens.
const LISTEN: u32 = 10;

/// Whether a socket of the host is at the other end of packets with these addresses.
#[inline(always)]
pub fn has_socket<F: Family>(ctx: &TcContext, key: &FlowKey<F>) -> bool {
    if key.proto == proto::TCP {
        // SAFETY: as `look` says.
        look(ctx, key, |ctx, tuple, size| unsafe {
            bpf_skc_lookup_tcp(ctx.skb.skb.cast(), tuple, size, OWN_NAMESPACE, 0)
        })
    } else if key.proto == proto::UDP {
        // SAFETY: as `look` says.
        look(ctx, key, |ctx, tuple, size| unsafe {
            bpf_sk_lookup_udp(ctx.skb.skb.cast(), tuple, size, OWN_NAMESPACE, 0)
        })
    } else {
        false
    }
}

/// Looks a socket up, but for one that listens, and gives it back.
#[inline(always)]
fn look<F: Family>(
    ctx: &TcContext,
    key: &FlowKey<F>,
    find: impl FnOnce(&TcContext, *mut bpf_sock_tuple, u32) -> *mut bpf_sock,
) -> bool {
    // A key begins as the kernel's tuple does: two addresses, two ports. The helpers only read that much.
    let tuple = core::ptr::from_ref(key).cast_mut().cast::<bpf_sock_tuple>();
    let size = 2 * size_of::<F::Addr>() as u32 + 4;
    let socket = find(ctx, tuple, size);
    if socket.is_null() {
        return false;
    }
    // SAFETY: the helper gave a socket, which stays until it is released. Volatile, so that it is read
    // before that.
    let state = unsafe { (&raw const (*socket).state).read_volatile() };
    // SAFETY: it is released once.
    unsafe { bpf_sk_release(socket.cast()) };
    key.proto != proto::TCP || state != LISTEN
}
