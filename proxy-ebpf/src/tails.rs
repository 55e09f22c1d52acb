//! From the program for every packet to those of the stories.

use aya_ebpf::btf_maps::ProgramArray;
use aya_ebpf::macros::btf_map;
use aya_ebpf::programs::TcContext;
use proxy_ebpf::datapath::Story;

/// For each story a program of either family, with Ethernet headers and without.
const TAILS: usize = Story::COUNT * 4;

#[btf_map(name = "tails")]
static TAIL: ProgramArray<TAILS> = ProgramArray::new();

/// Goes on with the program of a story. Returns only if there is none.
#[inline(always)]
pub fn tail_call(ctx: &TcContext, story: Story, is_v6: bool, has_ethernet: bool) {
    let index = story as u32 * 4 + u32::from(is_v6) * 2 + u32::from(!has_ethernet);
    // SAFETY: the program called is a classifier as the caller is, and nothing here needs to be dropped.
    unsafe { TAIL.tail_call(ctx, index) };
}
