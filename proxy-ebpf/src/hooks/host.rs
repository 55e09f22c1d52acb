//! What the host that a packet is on has: sockets and routes.

use core::ffi::c_void;
use core::mem::zeroed;

use aya_ebpf::bindings::{
    BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_SUCCESS,
    BPF_FIB_LOOKUP_OUTPUT, bpf_fib_lookup, bpf_sock, bpf_sock_tuple,
};
use aya_ebpf::helpers::{
    bpf_fib_lookup as look_up_route, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
    bpf_skc_lookup_tcp,
};
use aya_ebpf::programs::TcContext;
use bytemuck::Zeroable;
use proxy_common::tables::FlowKey;
use proxy_common::{Family, V4, proto};
use proxy_ebpf::packet::Route;

/// Address families, as the kernel numbers them.
pub const AF_INET: u8 = 2;
/// As [`AF_INET`].
pub const AF_INET6: u8 = 10;

/// How long the kernel's struct is.
const SIZE: i32 = 64;
const _: () = assert!(size_of::<bpf_fib_lookup>() == 64);

/// A question for the way from one address to another that begins with `link`: where a packet comes in, or by which it
/// leaves.
#[inline(always)]
fn question<F: Family>(link: u32, from: &F::Addr, to: &F::Addr) -> bpf_fib_lookup {
    // SAFETY: the kernel's struct of plain numbers, for which zeros are valid.
    let mut question: bpf_fib_lookup = unsafe { zeroed() };
    question.family = family::<F>();
    question.ifindex = link;
    let source = (&raw mut question.__bindgen_anon_3).cast::<F::Addr>();
    let destination = (&raw mut question.__bindgen_anon_4).cast::<F::Addr>();
    // SAFETY: both places are unions as long as the longest address, and aligned to four bytes as addresses are.
    unsafe {
        source.write(*from);
        destination.write(*to);
    }
    question
}

#[inline(always)]
fn destination<F: Family>(question: &bpf_fib_lookup) -> F::Addr {
    // SAFETY: as in `question`.
    unsafe { (&raw const question.__bindgen_anon_4).cast::<F::Addr>().read() }
}

#[inline(always)]
const fn family<F: Family>() -> u8 {
    if F::ETHERTYPE == V4::ETHERTYPE { AF_INET } else { AF_INET6 }
}

/// By which Ethernet addresses a link leads from one address to another, to whom and from whom. `None` if that is not known, or the
/// host's routes don't lead there by that link and by the gateway `hop`, if that is not zero.
#[inline(always)]
pub fn neighbours<F: Family>(
    ctx: *mut c_void,
    link: u32,
    (from, to): (&F::Addr, &F::Addr),
    hop: &F::Addr,
) -> Option<[[u8; 6]; 2]> {
    let mut question = question::<F>(link, from, to);
    // SAFETY: the helper reads and writes that many bytes of a live struct.
    let answer = unsafe { look_up_route(ctx, &raw mut question, SIZE, BPF_FIB_LOOKUP_OUTPUT) };
    // The destination is the gateway then, if there is one. A neighbour that has not answered yet may have an address of zeros.
    let is_known = answer == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
        && question.ifindex == link
        && question.dmac != [0; 6];
    let leads = *hop == F::Addr::zeroed() || destination::<F>(&question) == *hop;
    (is_known && leads).then_some([question.dmac, question.smac])
}

/// How the host forwards from one address to another what comes in by `link`.
#[inline(always)]
pub fn route<F: Family>(ctx: &TcContext, link: u32, from: &F::Addr, to: &F::Addr) -> Route<F> {
    let mut question = question::<F>(link, from, to);
    // SAFETY: the helper reads and writes that many bytes of a live struct.
    let answer = unsafe { look_up_route(ctx.skb.skb.cast(), &raw mut question, SIZE, 0) };
    let leads = [
        BPF_FIB_LKUP_RET_SUCCESS,
        BPF_FIB_LKUP_RET_NO_NEIGH,
        // The packet is too long for that link, but it is that one.
        BPF_FIB_LKUP_RET_FRAG_NEEDED,
    ];
    let leads = leads.into_iter().any(|code| answer == i64::from(code));
    if !leads {
        return Route { link: 0, hop: *to };
    }
    // The kernel puts the gateway in the destination's place. IPv4's may be one of IPv6.
    let hop = if question.family == family::<F>() { destination::<F>(&question) } else { *to };
    Route { link: question.ifindex, hop }
}

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

/// Whether a socket of the host is bound to the very address that packets of this key go to: one that takes what comes
/// to any address is not.
#[inline(always)]
pub fn listens<F: Family>(ctx: *mut c_void, key: &FlowKey<F>) -> bool {
    // As in `look`. Not by that: the verifier lets no pointer be to a socket here and to a request for one there.
    let tuple = core::ptr::from_ref(key).cast_mut().cast::<bpf_sock_tuple>();
    let size = 2 * size_of::<F::Addr>() as u32 + 4;
    let socket = if key.proto == proto::TCP {
        // SAFETY: the helper reads `size` bytes of the tuple.
        unsafe { bpf_sk_lookup_tcp(ctx, tuple, size, OWN_NAMESPACE, 0) }
    } else if key.proto == proto::UDP {
        // SAFETY: as above.
        unsafe { bpf_sk_lookup_udp(ctx, tuple, size, OWN_NAMESPACE, 0) }
    } else {
        return false;
    };
    if socket.is_null() {
        return false;
    }
    // SAFETY: the helper gave a socket, which stays until it is released. Volatile, so that it is read before that,
    // and in words, as the verifier demands.
    let bound: [u32; 4] = unsafe {
        if F::ETHERTYPE == V4::ETHERTYPE {
            [(&raw const (*socket).src_ip4).read_volatile(), 0, 0, 0]
        } else {
            let words = (&raw const (*socket).src_ip6).cast::<u32>();
            [0, 1, 2, 3].map(|at| words.add(at).read_volatile())
        }
    };
    // SAFETY: it is released once.
    unsafe { bpf_sk_release(socket.cast()) };
    bytemuck::bytes_of(&bound).starts_with(bytemuck::bytes_of(&key.dst))
}
